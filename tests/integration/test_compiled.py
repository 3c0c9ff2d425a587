"""Packages compiled for this processor: an encoder for any batch and length, and batch norms folded away."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from engines.compiled.agreement import compare
from engines.compiled.build import library_calls, package_key, store
from engines.compiled.build_onnx import TOLERANCE
from engines.compiled.cache import TensorSpec, packages_folder
from engines.compiled.engine import Array, CompiledEngine, InputError
from engines.compiled.exported import quiet_compiler
from engines.protocol import EngineLoadError
from tests.unit.models.encoder_checkpoints import reference_bert, write_encoder

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMSERVE_HOME", str(folder))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield folder
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(home: Path) -> Path:
    return write_encoder(home / "tiny", reference_bert(num_hidden_layers=1))


@pytest.fixture(scope="module")
def engine(source: Path) -> CompiledEngine:
    return CompiledEngine.load(source, "cpu", "fp32", report=lambda what: None)


def ids(texts: int, tokens: int) -> dict[str, Array]:
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: np.full((texts, tokens), int(name != "token_type_ids"), np.int64) for name in names}


def test_it_agrees_with_the_model(engine: CompiledEngine, source: Path) -> None:
    found = compare(engine, source)
    assert found.largest < 1e-5
    assert found.cosine > 0.99999


def test_results_do_not_depend_on_the_batch_or_on_threads(engine: CompiledEngine) -> None:
    alone = np.asarray(engine.run(ids(1, 7))["sentence_embedding"], np.float32)
    torch.set_num_threads(2)
    together = np.asarray(engine.run(ids(5, 7))["sentence_embedding"], np.float32)
    torch.set_num_threads(1)
    assert together.shape == (5, 32)
    np.testing.assert_allclose(together, np.repeat(alone, 5, 0), rtol=1e-5, atol=1e-6)


def test_the_second_time_nothing_is_compiled(engine: CompiledEngine, source: Path) -> None:
    seen: list[str] = []
    again = CompiledEngine.load(source, "cpu", "fp32", seen.append)
    assert seen == ["reading the model", "compiled before"]
    assert again.record == engine.record


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": np.full((2, 3), 40, np.int64)}, "values from 0 to 39"),
        ({"input_ids": np.full((2, 3), -1, np.int64)}, "values from 0 to 39"),
        ({"input_ids": np.ones((2, 3), np.int32)}, "must be int64, not int32"),
        ({"input_ids": np.ones((2, 4), np.int64)}, "same in all inputs"),
        ({"input_ids": np.ones(3, np.int64)}, "must have 2 axes, not 1"),
        ({"input_ids": np.ones((0, 3), np.int64)}, "has 0 entries"),
        ({"input_ids": np.ones((2, 25), np.int64)}, "1 to 24 tokens"),
        ({"attention_mask": np.full((2, 3), 2, np.int64)}, "values from 0 to 1"),
        ({"more": np.ones(1, np.int64)}, "the model takes the inputs attention_mask, input_ids, token_type_ids"),
    ],
)
def test_inputs_that_compiled_code_must_not_see(
    engine: CompiledEngine, changes: dict[str, Array], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        engine.run(ids(2, 3) | changes)


class Small(nn.Sequential):
    """Two convolutions, each with a batch norm and a ReLU."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        blocks = ((3, 16), (16, 16))
        super().__init__(
            *(
                layer
                for inputs, outputs in blocks
                for layer in (nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())
            )
        )
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_var is not None
                assert module.running_mean is not None
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.normal_(module.running_mean)


@pytest.fixture(scope="module")
def onnx_source(home: Path) -> Path:
    """A table of nine rows, a convolution over what is looked up, and rows counted by the graph itself."""
    onnx = pytest.importorskip("onnx")
    made, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    generator = np.random.default_rng(0)
    weights = {
        "table": generator.standard_normal((9, 4), np.float32),
        "kernel": generator.standard_normal((5, 4, 3), np.float32),
        "zero": np.array([0], np.int64),
        "rest": np.array([-1], np.int64),
    }
    nodes = [
        made("Gather", ["table", "ids"], ["rows"]),
        made("Transpose", ["rows"], ["columns"], perm=[0, 2, 1]),
        made("Conv", ["columns", "kernel"], ["mixed"], pads=[1, 1]),
        made("Relu", ["mixed"], ["active"]),
        made("ReduceMean", ["active"], ["mean"], axes=[2]),
        made("Shape", ["ids"], ["shape"]),
        made("Gather", ["shape", "zero"], ["count"]),
        made("Concat", ["count", "rest"], ["target"], axis=0),
        made("Reshape", ["mean", "target"], ["out"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("ids", onnx.TensorProto.INT64, ["items", "length"])],
        [value("out", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    path = home / "small.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_an_onnx_file_is_compiled_with_its_free_axes(onnx_source: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    engine = CompiledEngine.load_onnx(onnx_source, {"ids": (16, 40)}, "cpu", "fp32", report=lambda what: None)
    (spec,) = engine.record.inputs
    assert (spec.shape, spec.values) == (("items", "length"), 9)
    assert engine.record.axes["items"] == (1, 16)
    assert engine.record.axes["length"][1] == 40
    for shape in ((1, 7), (16, 40), (3, 8)):
        ids = np.random.default_rng(0).integers(0, 9, shape)
        (result,) = ReferenceEvaluator(str(onnx_source)).run(None, {"ids": ids})
        expected: NDArray[Any] = np.asarray(result)
        found: NDArray[Any] = np.asarray(engine.run({"ids": ids})["out"])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="values from 0 to 8"):
        engine.run({"ids": np.full((2, 4), 9)})


@pytest.mark.parametrize(
    ("longest", "message"),
    [
        ({}, r"input ids has free axes; say how long they may be: --shape ids=\?,\?"),
        ({"ids": (4,)}, r"declared as \?,\?"),
        ({"ids": (4, 4), "more": (1,)}, "has no input 'more'; its inputs are ids"),
    ],
)
def test_shapes_of_an_onnx_file(onnx_source: Path, longest: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(EngineLoadError, match=message):
        CompiledEngine.load_onnx(onnx_source, longest, "cpu", "fp32", report=lambda what: None)


def test_a_package_that_disagrees_with_its_graph_is_not_kept(
    onnx_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOLERANCE, torch.float32, -1.0)
    before = set(packages_folder().iterdir())
    with pytest.raises(EngineLoadError, match=r"disagrees with the graph at .* and is not kept"):
        CompiledEngine.load_onnx(onnx_source, {"ids": (8, 32)}, "cpu", "fp32", report=lambda what: None)
    assert set(packages_folder().iterdir()) == before


def test_batch_norms_and_relus_become_part_of_convolutions(home: Path) -> None:
    model = Small().eval()
    axes = {0: torch.export.Dim("images", min=1, max=16)}
    with torch.no_grad(), quiet_compiler():
        program = torch.export.export(model, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=(axes,))
    operations = [node for node in program.graph.nodes if node.op == "call_function"]
    assert [node.target.__name__ for node in operations] == 2 * ["conv2d.default", "batch_norm.default", "relu.default"]
    record, package = store(
        package_key("small", "cpu", "fp32"),
        "small",
        program,
        (TensorSpec(name="images", dtype="float32", shape=("images", 3, 32, 32)),),
        (TensorSpec(name="features", dtype="float32", shape=("images", 16, 32, 32)),),
        {"images": (1, 16)},
    )
    calls = library_calls(package)
    # Two calls, one a block; what is generated besides changes the layout of the input and the output.
    assert calls["mkldnn__convolution_pointwise"] == 2
    assert not any("batch_norm" in name for name in calls)
    assert record.kernels <= 2
    images = np.random.default_rng(0).standard_normal((5, 3, 32, 32), np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    found = np.asarray(CompiledEngine(record, package).run({"images": images})["features"], np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
