"""ONNX files to graphs: shapes without running them, and a run of a real graph inside one planned buffer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from engines.planner.onnx_graph import read_onnx_graph, read_shapes
from engines.planner.plan import plan_memory
from engines.protocol import EngineLoadError

FLOAT = TensorProto.FLOAT


def weight(name: str, *shape: int) -> onnx.TensorProto:
    generator = np.random.default_rng(len(name) + sum(shape))
    return numpy_helper.from_array(generator.standard_normal(shape, np.float32), name)


def model(nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], output: str = "out") -> onnx.ModelProto:
    images = helper.make_tensor_value_info("images", FLOAT, ["n", 3, 8, 8])
    graph = helper.make_graph(nodes, "g", [images], [helper.make_tensor_value_info(output, FLOAT, None)], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def network() -> onnx.ModelProto:
    """A residual block, then rows whose count is computed from the input's shape, as exporters write it."""
    nodes = [
        helper.make_node("Conv", ["images", "w1"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "b"], ["d"]),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("Shape", ["images"], ["shape"]),
        helper.make_node("Constant", [], ["zero"], value=numpy_helper.from_array(np.array([0], np.int64))),
        helper.make_node("Gather", ["shape", "zero"], ["rows"]),
        helper.make_node("Constant", [], ["rest"], value=numpy_helper.from_array(np.array([-1], np.int64))),
        helper.make_node("Concat", ["rows", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["e", "target"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w3"], ["out"]),
    ]
    return model(nodes, [weight("w1", 4, 3, 3, 3), weight("w2", 4, 4, 3, 3), weight("w3", 256, 5)])


def saved(folder: Path, graph: onnx.ModelProto) -> Path:
    onnx.save(graph, folder / "model.onnx")
    return folder / "model.onnx"


def test_sizes_follow_shapes_that_the_graph_computes(tmp_path: Path) -> None:
    graph = read_onnx_graph(saved(tmp_path, network()), {"images": (2, 3, 8, 8)})
    assert graph.sizes["flat"] == graph.sizes["a"] == 2 * 4 * 64 * 4
    assert graph.sizes["out"] == 2 * 5 * 4
    assert graph.outputs == {"out"}


def test_a_run_inside_the_planned_buffer_gives_the_same_result(tmp_path: Path) -> None:
    network_model = network()
    graph = read_onnx_graph(saved(tmp_path, network_model), {"images": (2, 3, 8, 8)})
    plan = plan_memory(graph)
    assert plan.peak < 0.7 * plan.unshared
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8), np.float32)
    (expected,) = ReferenceEvaluator(network_model).run(None, {"images": images})
    places = {
        name: offset for storage, offset in zip(plan.storages, plan.offsets, strict=True) for name in storage.tensors
    }
    buffer = np.full(plan.peak, 0xAB, np.uint8)
    outside: dict[str, NDArray[np.generic]] = {"images": images}
    outside |= {each.name: numpy_helper.to_array(each) for each in network_model.graph.initializer}
    kinds: dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]] = {}

    def read(name: str) -> NDArray[np.generic]:
        if name in outside:
            return outside[name]
        kind, shape = kinds[name]
        return buffer[places[name] : places[name] + graph.sizes[name]].view(kind).reshape(shape)

    for node in network_model.graph.node:
        one = helper.make_model(
            helper.make_graph(
                [node],
                "one",
                [onnx.ValueInfoProto(name=name) for name in node.input],
                [onnx.ValueInfoProto(name=name) for name in node.output],
            ),
            opset_imports=network_model.opset_import,
            ir_version=9,
        )
        (result,) = ReferenceEvaluator(one).run(None, {name: read(name).copy() for name in node.input})
        value, name = np.asarray(result), node.output[0]
        if node.op_type == "Constant":
            outside[name] = value
            continue
        kinds[name] = value.dtype, value.shape
        assert value.nbytes == graph.sizes[name]
        buffer[places[name] : places[name] + value.nbytes] = np.frombuffer(value.tobytes(), np.uint8)
    np.testing.assert_array_equal(read("out"), expected)


def test_weights_outside_the_file_are_not_looked_for(tmp_path: Path) -> None:
    network_model = network()
    path = tmp_path / "model.onnx"
    onnx.save(network_model, path, save_as_external_data=True, location="weights.bin", size_threshold=16)
    (tmp_path / "weights.bin").unlink()
    assert read_onnx_graph(path, {"images": (1, 3, 8, 8)}).sizes["out"] == 20


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, r"input images has free axes; give its shape: --shape images=\?,3,8,8"),
        ({"images": (2, 4, 8, 8)}, "declared as"),
        ({"images": (2, 3, 8)}, "declared as"),
        ({"images": (2, 3, 8, 8), "no": (1,)}, "has no input 'no'; its inputs are images"),
    ],
)
def test_a_wrong_shape_is_named(tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(EngineLoadError, match=message):
        read_onnx_graph(saved(tmp_path, network()), shapes)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("NonZero", ["images"], ["out"]), "depends on the data"),
        (helper.make_node("Magic", ["images"], ["out"], domain="corp"), "corp.Magic are not known"),
        (helper.make_node("Magic", ["images"], ["out"]), "Magic"),
        (helper.make_node("Relu", ["missing"], ["out"]), "Relu"),
    ],
)
def test_what_has_no_size_is_refused(tmp_path: Path, node: onnx.NodeProto, message: str) -> None:
    with pytest.raises(EngineLoadError, match=message):
        read_onnx_graph(saved(tmp_path, model([node], [])), {"images": (1, 3, 8, 8)})


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for content in (b"", b"not a model", saved(tmp_path, network()).read_bytes()[:-100]):
        path.write_bytes(content)
        with pytest.raises(EngineLoadError, match=r"model\.onnx is no ONNX file"):
            read_onnx_graph(path, {"images": (1, 3, 8, 8)})


@pytest.mark.parametrize("option", ["images", "=1", "images=1,-2", "images=1,x", "images=0"])
def test_a_shape_option_that_is_none(option: str) -> None:
    with pytest.raises(EngineLoadError, match="is no shape"):
        read_shapes([option])


def test_shape_options() -> None:
    assert read_shapes(["a=b=1,2", "scalar="]) == {"a=b": (1, 2), "scalar": ()}
