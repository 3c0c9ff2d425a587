"""An ONNX file and the shapes of its inputs to a graph of sizes, without running it and without its weights.

Shapes are inferred node by node, each with the values that are known by then: of a network whose input shapes are
given, all that ``Shape``, ``Gather`` and ``Concat`` compute for a ``Reshape`` is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from engines.planner.lifetimes import Graph, Step
from engines.protocol import EngineLoadError

Shape = tuple[int, ...]
Values = dict[str, NDArray[np.generic]]

MOST_FILE_BYTES = 2 << 30
MOST_NODES = 100_000
MOST_KNOWN = 4096
"""Elements of a tensor whose values are followed; shapes and axes are far fewer."""
STANDARD = ("", "ai.onnx")


def read_onnx_graph(path: Path, shapes: Mapping[str, Shape]) -> Graph:
    """``shapes`` gives the inputs' shapes, those without free axes excepted. External weights are never opened.

    Raises EngineLoadError for a damaged file, a missing or wrong shape, and a tensor whose shape depends on data.
    """
    model = _read(path)
    types = _input_types(model, shapes)
    walk = _Walk(model, types)
    steps = tuple(walk.take(node) for node in model.graph.node if node.op_type != "Constant")
    return Graph(steps=steps, sizes=walk.sizes, outputs=frozenset(output.name for output in model.graph.output))


def read_shapes(options: list[str]) -> dict[str, Shape]:
    """``name=1,3,224,224`` each. Raises EngineLoadError."""
    found = {}
    for option in options:
        name, _, numbers = option.rpartition("=")
        parts = numbers.split(",") if numbers else []
        if not name or not all(part.isascii() and part.isdigit() and 0 < int(part) < 1 << 31 for part in parts):
            raise EngineLoadError(f"{option[:80]!r} is no shape; write NAME=1,3,224,224")
        found[name] = tuple(int(part) for part in parts)
    return found


def _read(path: Path) -> onnx.ModelProto:
    try:
        if path.stat().st_size > MOST_FILE_BYTES:
            raise EngineLoadError(f"{path.name} is larger than 2 GB, which the format does not allow")
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise EngineLoadError(f"{path.name} cannot be read: {error.strerror}") from error
    except DecodeError as error:
        raise EngineLoadError(f"{path.name} is no ONNX file, or it is damaged") from error
    if not model.graph.node:
        raise EngineLoadError(f"{path.name} is no ONNX file, or it computes nothing")
    if len(model.graph.node) > MOST_NODES:
        raise EngineLoadError(f"{path.name} has more than {MOST_NODES} nodes")
    return model


def _input_types(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> dict[str, onnx.TypeProto]:
    weights = {weight.name for weight in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in weights]
    unknown = sorted(shapes.keys() - {each.name for each in inputs})
    if unknown:
        names = ", ".join(each.name for each in inputs)
        raise EngineLoadError(f"the graph has no input {unknown[0][:80]!r}; its inputs are {names}")
    return {each.name: _input_type(each, shapes.get(each.name)) for each in inputs}


def _input_type(value: onnx.ValueInfoProto, shape: Shape | None) -> onnx.TypeProto:
    declared = value.type.tensor_type
    axes = [axis.dim_value if axis.HasField("dim_value") else None for axis in declared.shape.dim]
    written = ",".join(str(axis) if axis else "?" for axis in axes)
    if shape is None:
        if None in axes or not declared.HasField("shape"):
            raise EngineLoadError(f"input {value.name} has free axes; give its shape: --shape {value.name}={written}")
        shape = tuple(axis or 0 for axis in axes)
    fits = len(shape) == len(axes) and all(axis in (None, given) for axis, given in zip(axes, shape, strict=True))
    if declared.HasField("shape") and not fits:
        given = ",".join(map(str, shape))
        raise EngineLoadError(f"input {value.name} is declared as {written}; {given} does not fit that")
    return helper.make_tensor_type_proto(declared.elem_type, shape)


class _Walk:
    """Types, sizes and small values of all tensors, as far as the graph was read."""

    def __init__(self, model: onnx.ModelProto, inputs: dict[str, onnx.TypeProto]) -> None:
        self.sizes: dict[str, int] = {}
        self._types = dict(inputs)
        self._values: Values = {}
        self._ir_version = model.ir_version
        self._opsets = list(model.opset_import)
        for weight in model.graph.initializer:
            self._types[weight.name] = helper.make_tensor_type_proto(weight.data_type, list(weight.dims))
            if math.prod(weight.dims) <= MOST_KNOWN and weight.data_location != onnx.TensorProto.EXTERNAL:
                self._values[weight.name] = numpy_helper.to_array(weight)
        for node in model.graph.node:
            if node.op_type == "Constant":
                self._constant(node)

    def take(self, node: onnx.NodeProto) -> Step:
        """Infer the node's outputs. Raises EngineLoadError where that cannot be done."""
        if node.domain not in STANDARD:
            raise EngineLoadError(
                f"the shapes of {node.domain[:80]}.{node.op_type[:80]} are not known; it is no ONNX op"
            )
        if any(attribute.HasField("g") for attribute in node.attribute):
            raise EngineLoadError(f"{node.op_type} runs a graph of its own; such graphs are not planned")
        absent = next((name for name in node.input if name and name not in self._types), None)
        if absent is not None or not any(node.output):
            raise EngineLoadError(f"{node.op_type[:80]} reads {str(absent)[:80]}, which nothing before it makes")
        self._follow(node)
        for name, found in self._infer(node).items():
            self._types[name] = found
        outputs = tuple(name for name in node.output if name)
        for name in outputs:
            self.sizes[name] = self._nbytes(name, node)
        return Step(
            name=node.name or outputs[0],
            op=node.op_type,
            inputs=tuple(node.input),
            outputs=outputs,
        )

    def _constant(self, node: onnx.NodeProto) -> None:
        value = self._evaluate(node, {})[0]
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        self._types[node.output[0]] = helper.make_tensor_type_proto(kind, value.shape)
        if value.size <= MOST_KNOWN:
            self._values[node.output[0]] = value

    def _infer(self, node: onnx.NodeProto) -> dict[str, onnx.TypeProto]:
        known = {name: numpy_helper.from_array(self._values[name]) for name in node.input if name in self._values}
        types = {name: self._types[name] for name in node.input if name}
        try:
            schema = onnx.defs.get_schema(node.op_type, self._version(), node.domain)
            found = shape_inference.infer_node_outputs(
                schema, node, types, known, opset_imports=self._opsets, ir_version=self._ir_version
            )
        except (onnx.defs.SchemaError, shape_inference.InferenceError) as error:
            raise EngineLoadError(f"{node.op_type} {node.name[:80]}: {str(error)[:200]}") from error
        return dict(found)

    def _follow(self, node: onnx.NodeProto) -> None:
        """Values of the outputs, where all inputs have some, or where only their shape is asked for."""
        feeds: Values = {}
        if node.op_type == "Shape" and self._shape(node.input[0]) is not None:
            feeds[node.input[0]] = np.broadcast_to(np.zeros((), np.bool_), self._shape(node.input[0]) or ())
        elif all(name in self._values for name in node.input if name):
            feeds = {name: self._values[name] for name in node.input if name}
        else:
            return
        for name, value in zip(node.output, self._evaluate(node, feeds), strict=False):
            if value.size <= MOST_KNOWN:
                self._values[name] = value

    def _evaluate(self, node: onnx.NodeProto, feeds: Values) -> list[NDArray[np.generic]]:
        kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in feeds.items()}
        graph = helper.make_graph(
            [node],
            "node",
            [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
            [onnx.ValueInfoProto(name=name) for name in node.output if name],
        )
        model = helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version)
        return [np.asarray(value) for value in ReferenceEvaluator(model).run(None, feeds)]

    def _version(self) -> int:
        return next((each.version for each in self._opsets if each.domain in STANDARD), 1)

    def _shape(self, name: str) -> Shape | None:
        if name not in self._types:
            return None
        tensor = self._types[name].tensor_type
        if not tensor.HasField("shape") or not all(axis.HasField("dim_value") for axis in tensor.shape.dim):
            return None
        return tuple(axis.dim_value for axis in tensor.shape.dim)

    def _nbytes(self, name: str, node: onnx.NodeProto) -> int:
        shape = self._shape(name)
        if shape is None:
            raise EngineLoadError(f"the shape of {name[:80]}, made by {node.op_type}, depends on the data")
        kind = self._types[name].tensor_type.elem_type
        if kind == onnx.TensorProto.STRING:
            raise EngineLoadError(f"{name[:80]} holds strings, whose size is not known")
        return math.prod(shape) * helper.tensor_dtype_to_np_dtype(kind).itemsize
