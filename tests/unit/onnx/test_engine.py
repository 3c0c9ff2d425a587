"""The engine alone: graphs of a few nodes, real ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engines.protocol import EngineLoadError, EngineSpec, OneShotRow, RowResult, StepPlan, TensorEngine
from engines.tensors import Tensor, pack, unpack
from tests.plain_models import CROSSED, DOUBLE, LOOKUP, MASKED, write_graph

pytest.importorskip("onnxruntime")
from engines.onnx.arrays import Array
from engines.onnx.engine import OnnxEngine


def load(path: Path, **fields: int) -> OnnxEngine:
    return OnnxEngine.load(EngineSpec(name="m", kind="onnx", source=str(path), threads=1, **fields), lambda news: None)  # type: ignore[arg-type]


def packed(wanted: tuple[str, ...] = (), **arrays: Array) -> bytes:
    names = {"float32": "FP32", "int64": "INT64"}
    tensors = [Tensor(name, names[array.dtype.name], array.shape, array.tobytes()) for name, array in arrays.items()]
    return pack(tensors, wanted)


def step(engine: OnnxEngine, inputs: list[bytes], rows: list[int], number: int = 1) -> list[RowResult]:
    for item, each in enumerate(inputs):
        engine.put(item, each)
    one_shot = tuple(OneShotRow(item=item, bucket=0, rows=count) for item, count in enumerate(rows))
    engine.launch(StepPlan(step=number, engine="m", one_shot=one_shot, padded_rows=sum(rows)))
    result = engine.collect(number)
    assert result.seconds > 0
    assert (result.irregular == "retry") == any(row.error for row in result.rows)
    return result.rows


def arrays_of(row: RowResult) -> dict[str, Array]:
    assert not row.error
    dtypes = {"FP32": np.float32, "INT64": np.int64}
    return {
        each.name: np.frombuffer(each.data, dtypes[each.datatype]).reshape(each.shape) for each in unpack(row.output)[0]
    }


@pytest.fixture
def double(tmp_path: Path) -> Iterator[OnnxEngine]:
    engine = load(write_graph(tmp_path, DOUBLE))
    yield engine
    engine.close()


def test_rows_of_several_requests_share_a_step_and_come_back_to_their_own(double: OnnxEngine) -> None:
    assert isinstance(double, TensorEngine)
    signature = double.info.signature
    assert signature is not None
    assert (signature.batched, signature.max_rows, signature.free_axes) == (True, 64, ())
    xs = [np.full((rows, 3), rows, np.float32) for rows in (1, 4, 2)]
    results = step(double, [packed(x=x) for x in xs], [1, 4, 2])
    for x, row in zip(xs, results, strict=True):
        np.testing.assert_array_equal(arrays_of(row)["y"], 2 * x)


def test_steps_are_answered_in_their_order(double: OnnxEngine) -> None:
    for number in (1, 2):
        double.put(number, packed(x=np.full((1, 3), number, np.float32)))
        alone = (OneShotRow(item=number, bucket=0, rows=1),)
        assert double.launch(StepPlan(step=number, engine="m", one_shot=alone, padded_rows=1)) == number
    for number in (1, 2):
        (row,) = double.collect(number).rows
        assert arrays_of(row)["y"][0, 0] == 2 * number


def test_one_bad_row_fails_alone(tmp_path: Path) -> None:
    engine = load(write_graph(tmp_path, LOOKUP))
    good = np.array([[1, 2]], np.int64)
    results = step(engine, [packed(ids=good), packed(ids=np.array([[1, 99]], np.int64)), packed(ids=good)], [1, 1, 1])
    assert [bool(row.error) for row in results] == [False, True, False]
    assert "99" in results[1].error
    assert "/" not in results[1].error
    np.testing.assert_array_equal(arrays_of(results[2])["rows"], [[[2, 3], [4, 5]]])
    engine.close()


def test_lengths_are_padded_to_their_bucket_and_cut_again(tmp_path: Path) -> None:
    engine = load(write_graph(tmp_path, MASKED))
    signature = engine.info.signature
    assert signature is not None
    assert signature.padded == ("L",)
    assert signature.bucket({"L": 3}) == signature.bucket({"L": 8}) == 8
    assert signature.bucket({"L": 9}) == 16
    inputs, expected = [], []
    for length in (3, 8):
        ids = np.arange(1, length + 1, dtype=np.int64)[None]
        inputs.append(packed(input_ids=ids, attention_mask=np.ones_like(ids)))
        expected.append(ids.astype(np.float32))
    for row, wanted in zip(step(engine, inputs, [1, 1]), expected, strict=True):
        np.testing.assert_array_equal(arrays_of(row)["hidden"], wanted)
    engine.close()


def test_a_graph_whose_rows_depend_on_each_other_is_not_batched(tmp_path: Path) -> None:
    engine = load(write_graph(tmp_path, CROSSED))
    signature = engine.info.signature
    assert signature is not None
    assert not signature.batched
    assert engine.capacity.max_rows == 1
    (row,) = step(engine, [packed(x=np.ones((2, 2), np.float32))], [1])
    np.testing.assert_array_equal(arrays_of(row)["y"], np.full((2, 2), 5.0))
    engine.close()


def test_only_the_outputs_that_are_wanted_come_back(tmp_path: Path) -> None:
    graph = "two (float[N, 3] x) => (float[N, 3] y, float[N, 3] z) { y = Add(x, x) z = Mul(x, x) }"
    engine = load(write_graph(tmp_path, graph))
    (row,) = step(engine, [packed(("z",), x=np.full((1, 3), 3, np.float32))], [1])
    assert {name: array[0, 0] for name, array in arrays_of(row).items()} == {"z": 9}
    engine.close()


def test_a_file_that_the_runtime_refuses_says_so(tmp_path: Path) -> None:
    path = write_graph(tmp_path, "wrong (float[N, 3] x) => (float[N, 3] y) { y = NoSuchOperator(x) }")
    with pytest.raises(EngineLoadError, match=r"model\.onnx is damaged, or ONNX Runtime does not support it"):
        load(path)


def test_a_load_measures_steps_and_starts_from_them(tmp_path: Path) -> None:
    engine = OnnxEngine.load(
        EngineSpec(name="m", kind="onnx", source=str(write_graph(tmp_path, DOUBLE))), lambda news: None
    )
    measured = engine.info.measured
    assert measured is not None
    assert [sample.rows for sample in measured.profile] == [1, 4, 16]
    assert all(sample.seconds > 0 and sample.bucket == 0 for sample in measured.profile)
    assert measured.threads == engine.info.threads >= 1
    engine.close()
