"""Each operator in torch gives what ONNX's own reference gives, and what is not known is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from engines.compiled.onnx_module import OnnxModule, read_onnx
from engines.compiled.onnx_ops import OPERATORS
from engines.protocol import EngineLoadError

IMAGES, ROWS = (2, 4, 7, 8), (3, 6)


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


Case = tuple[str, tuple[int, ...], list[Any], dict[str, Any]]
CASES: list[Case] = [
    ("Conv", IMAGES, [floats(6, 4, 3, 3), floats(6)], {"pads": [1, 1, 1, 1], "strides": [2, 1]}),
    ("Conv", IMAGES, [floats(4, 1, 3, 2)], {"group": 4, "pads": [0, 1, 2, 0]}),
    ("Conv", (2, 3, 5, 4, 4), [floats(2, 3, 2, 2, 2)], {"dilations": [2, 1, 1]}),
    ("Conv", (2, 3, 9), [floats(5, 3, 3)], {}),
    ("MaxPool", IMAGES, [], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0]}),
    ("MaxPool", IMAGES, [], {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 1, 0, 0]}),
    ("AveragePool", IMAGES, [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ("AveragePool", IMAGES, [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ("GlobalAveragePool", IMAGES, [], {}),
    ("GlobalMaxPool", IMAGES, [], {}),
    ("BatchNormalization", IMAGES, [floats(4), floats(4), floats(4), floats(4) ** 2 + 1], {"epsilon": 1e-3}),
    ("LayerNormalization", IMAGES, [floats(8), floats(8)], {"epsilon": 1e-3}),
    ("LayerNormalization", IMAGES, [floats(7, 8)], {"axis": 2}),
    ("Gemm", ROWS, [floats(5, 6), floats(5)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", ROWS, [floats(3, 2)], {"transA": 1}),
    ("MatMul", IMAGES, [floats(8, 3)], {}),
    ("Softmax", IMAGES, [], {"axis": 1}),
    ("ReduceMean", IMAGES, [ints(2, 3)], {}),
    ("ReduceSum", IMAGES, [ints(-1)], {"keepdims": 0}),
    ("ReduceMax", IMAGES, [], {"keepdims": 0}),
    ("ReduceL2", ROWS, [ints(1)], {}),
    ("Reshape", IMAGES, [ints(0, -1, 8)], {}),
    ("Flatten", IMAGES, [], {"axis": 2}),
    ("Flatten", IMAGES, [], {"axis": 1}),
    ("Transpose", IMAGES, [], {"perm": [0, 2, 3, 1]}),
    ("Transpose", ROWS, [], {}),
    ("Squeeze", (2, 1, 3, 1), [ints(1, -1)], {}),
    ("Unsqueeze", ROWS, [ints(0, -1)], {}),
    ("Concat", ROWS, [floats(3, 2)], {"axis": 1}),
    ("Slice", IMAGES, [ints(1, -3), ints(1 << 40, -1), ints(2, 3), ints(2, 1)], {}),
    ("Slice", ROWS, [ints(1), ints(3)], {}),
    ("Gather", ROWS, [ints(2, 0)], {"axis": 1}),
    ("Gather", ROWS, [ints(2, 0)], {}),
    ("Gather", ROWS, [np.array(-1, np.int64)], {"axis": 1}),
    ("Gather", (3, 4, 5), [ints(1)], {"axis": 0}),
    ("Pad", IMAGES, [ints(0, 0, 1, 2, 0, 0, 3, 0), np.array(0.5, np.float32)], {}),
    ("Expand", (3, 1), [ints(2, 1, 6)], {}),
    ("Clip", ROWS, [np.array(-0.5, np.float32), np.array(0.5, np.float32)], {}),
    ("Add", ROWS, [floats(6)], {}),
    ("Sub", ROWS, [np.array(2, np.float32)], {}),
    ("Mul", ROWS, [floats(3, 1)], {}),
    ("Div", ROWS, [np.array(3, np.float32)], {}),
    ("Pow", ROWS, [np.array(2, np.float32)], {}),
    ("Cast", ROWS, [], {"to": TensorProto.INT64}),
    ("Shape", IMAGES, [], {"start": 1}),
    ("LeakyRelu", ROWS, [], {"alpha": 0.2}),
    ("HardSigmoid", ROWS, [], {"alpha": 0.3, "beta": 0.4}),
    ("Gelu", ROWS, [], {"approximate": "tanh"}),
    *((op, ROWS, [], {}) for op in ("Relu", "Sigmoid", "HardSwish", "Tanh", "Erf", "Exp", "Neg", "Identity")),
]


def build(nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], outputs: list[str]) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    made = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph(nodes, "g", inputs, made, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def compare(model: onnx.ModelProto, values: np.ndarray[Any, Any]) -> None:
    expected = ReferenceEvaluator(model).run(None, {"x": values})
    module = OnnxModule(model, torch.float32)
    found = [module.run_values(torch.from_numpy(values))[name] for name in module.outputs]
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(np.asarray(other), one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("op", "shape", "constants", "attributes"), CASES)
def test_operator(op: str, shape: tuple[int, ...], constants: list[Any], attributes: dict[str, Any]) -> None:
    weights = [numpy_helper.from_array(value, f"w{at}") for at, value in enumerate(constants)]
    node = helper.make_node(op, ["x", *(weight.name for weight in weights)], ["y"], **attributes)
    compare(build([node], weights, ["y"]), floats(*shape))


def test_every_operator_is_compared() -> None:
    elsewhere = {"Split", "Sqrt", "Dropout"}
    assert {case[0] for case in CASES} | elsewhere == OPERATORS.keys()


def test_outputs_that_are_several_and_shapes_that_are_computed() -> None:
    nodes = [
        helper.make_node("Split", ["x", "sizes"], ["a", "b"], axis=1),
        helper.make_node("Exp", ["b"], ["e"]),
        helper.make_node("Sqrt", ["e"], ["r"]),
        helper.make_node("Dropout", ["r"], ["d"]),
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Mul", ["n", "two"], ["m"]),
        helper.make_node("Div", ["m", "two"], ["k"]),
        helper.make_node("Concat", ["k", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["d", "target"], ["y"]),
    ]
    constants = {"sizes": ints(2, 4), "zero": ints(0), "two": ints(2), "rest": ints(2, -1)}
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    compare(build(nodes, weights, ["a", "y"]), floats(3, 6))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("NonZero", ["x"], ["y"]), "operator NonZero is not supported"),
        (helper.make_node("Relu", ["x"], ["y"], domain="corp"), r"operator corp\.Relu is not supported"),
    ],
)
def test_unknown_operators_are_named(node: onnx.NodeProto, message: str) -> None:
    with pytest.raises(EngineLoadError, match=message):
        OnnxModule(build([node], [], ["y"]), torch.float32)


def test_weights_outside_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = build([helper.make_node("Add", ["x", "w"], ["y"])], [numpy_helper.from_array(floats(64), "w")], ["y"])
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=16)
    with pytest.raises(EngineLoadError, match="outside the ONNX file are not read"):
        read_onnx(path, torch.float32)
    for content in (b"", b"nothing of the kind"):
        path.write_bytes(content)
        with pytest.raises(EngineLoadError, match="is no ONNX file"):
            read_onnx(path, torch.float32)
