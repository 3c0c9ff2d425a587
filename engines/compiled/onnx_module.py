"""An ONNX file as a torch module, so that it can be compiled like any other. Only its own bytes are read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper
from torch import nn

from engines.compiled.onnx_ops import OPERATORS, Value
from engines.protocol import EngineLoadError

MOST_FILE_BYTES = 2 << 30
MOST_SHAPE = 64
"""Whole numbers in a constant that counts as a shape or a list of axes."""


class OnnxModule(nn.Module):
    """Runs the graph's nodes in order. Float weights and inputs are converted to one dtype, outputs to float32."""

    def __init__(self, model: onnx.ModelProto, dtype: torch.dtype) -> None:
        """Raises EngineLoadError for what is not supported, by name."""
        super().__init__()
        self.dtype = dtype
        self.opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 1)
        self._constants: dict[str, Value] = {}
        self._buffers_of: dict[str, str] = {}
        for weight in model.graph.initializer:
            if weight.data_location == onnx.TensorProto.EXTERNAL:
                raise EngineLoadError("weights outside the ONNX file are not read; save the model as one file")
            self._keep(weight.name, numpy_helper.to_array(weight))
        own = {weight.name for weight in model.graph.initializer}
        self.inputs = [each for each in model.graph.input if each.name not in own]
        self.outputs = [each.name for each in model.graph.output]
        self._nodes = [self._parse(node) for node in model.graph.node if node.op_type != "Constant"]
        for node in model.graph.node:
            if node.op_type == "Constant":
                value = next((each.t for each in node.attribute if each.name == "value"), None)
                if value is None:
                    raise EngineLoadError("a Constant without a tensor is not supported")
                self._keep(node.output[0], numpy_helper.to_array(value))

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The graph's inputs in its order, to its outputs in their order."""
        values = self.run_values(*given)
        found = (values[name] for name in self.outputs)
        return tuple(each.float() if each.is_floating_point() else each for each in found)

    def table_rows(self, name: str) -> int | None:
        """Rows of the smallest table that an input's values are looked up in; None where there is none."""
        rows = [
            getattr(self, self._buffers_of[inputs[0]]).shape[0]
            for op, inputs, _, attributes in self._nodes
            if op == "Gather" and inputs[1] == name and inputs[0] in self._buffers_of and not attributes.get("axis", 0)
        ]
        return min(rows, default=None)

    def run_values(self, *given: torch.Tensor) -> dict[str, Value]:
        """Every value of the graph by its name."""
        values: dict[str, Value] = {"": None, **self._constants}
        values |= {name: getattr(self, buffer) for name, buffer in self._buffers_of.items()}
        for declared, tensor in zip(self.inputs, given, strict=True):
            values[declared.name] = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        for op, inputs, outputs, attributes in self._nodes:
            result = OPERATORS[op](attributes, *(values[name] for name in inputs))
            results = result if op == "Split" else (result,)
            values |= dict(zip(outputs, results, strict=op == "Split"))
        return values

    def _keep(self, name: str, array: Any) -> None:
        if array.dtype.kind == "i" and array.ndim < 2 and array.size <= MOST_SHAPE:
            self._constants[name] = array.tolist()
            return
        if array.dtype.kind == "f" and array.ndim == 0:
            self._constants[name] = float(array)
            return
        tensor = torch.from_numpy(array.copy())
        self._buffers_of[name] = f"weight_{len(self._buffers_of)}"
        converted = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        self.register_buffer(self._buffers_of[name], converted)

    def _parse(self, node: onnx.NodeProto) -> tuple[str, tuple[str, ...], tuple[str, ...], dict[str, Any]]:
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            name = f"{node.domain}.{node.op_type}".strip(".")
            raise EngineLoadError(f"the operator {name[:80]} is not supported by the compiler; ONNX Runtime may run it")
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        attributes |= {"opset": self.opset, "dtype": self.dtype, "outputs": len(node.output)}
        return node.op_type, tuple(node.input), tuple(node.output), attributes


def read_onnx(path: Path, dtype: torch.dtype) -> tuple[OnnxModule, str]:
    """The module, and the SHA-256 of the file. Raises EngineLoadError."""
    try:
        if path.stat().st_size > MOST_FILE_BYTES:
            raise EngineLoadError(f"{path.name} is larger than 2 GB, which the format does not allow")
        content = path.read_bytes()
        model = onnx.load_model_from_string(content)
    except OSError as error:
        raise EngineLoadError(f"{path.name} cannot be read: {error.strerror}") from error
    except DecodeError as error:
        raise EngineLoadError(f"{path.name} is no ONNX file, or it is damaged") from error
    if not model.graph.node:
        raise EngineLoadError(f"{path.name} is no ONNX file, or it computes nothing")
    return OnnxModule(model, dtype).eval(), hashlib.sha256(content).hexdigest()
