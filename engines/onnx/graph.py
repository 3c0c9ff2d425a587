"""What a graph's inputs and outputs look like, read from a session: names, types, fixed and free axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engines.protocol import EngineLoadError
from engines.tensors import BYTES, TensorSpec

MASK = "attention_mask"
"""An encoder with this input does not look at what the mask leaves out, so its length may be padded."""

_TYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": BYTES,
}


def read_specs(arguments: Sequence[Any], what: str) -> tuple[TensorSpec, ...]:
    """Of ``session.get_inputs()`` or ``get_outputs()``. Raises EngineLoadError for types that no request can carry."""
    specs = []
    for argument in arguments:
        datatype = _TYPES.get(argument.type)
        if datatype is None:
            raise EngineLoadError(
                f"the {what} {argument.name[:80]!r} is a {argument.type[:40]}; tensors of numbers, booleans and "
                "strings can be served"
            )
        axes = tuple(_symbol(argument.name, index, size) for index, size in enumerate(argument.shape))
        shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in argument.shape)
        specs.append(TensorSpec(name=argument.name, datatype=datatype, shape=shape, axes=axes))
    if not specs:
        raise EngineLoadError(f"the graph has no {what}")
    return tuple(specs)


def _symbol(name: str, index: int, size: object) -> str:
    """Exporters write a question mark, or nothing, for an axis without a name: it is like no other."""
    if isinstance(size, int) and size >= 0:
        return ""
    return size if isinstance(size, str) and size not in ("", "?") else f"{name}.{index}"


def may_be_batched(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Axis 0 of everything is free. Whether it is the batch shows when the graph runs."""
    return all(spec.shape[:1] == (-1,) for spec in (*inputs, *outputs))


def padded_axes(inputs: Sequence[TensorSpec]) -> tuple[str, ...]:
    """The length of an encoder whose mask says how much of it counts."""
    mask = next((spec for spec in inputs if spec.name == MASK and len(spec.axes) == 2), None)
    return () if mask is None or not mask.axes[1] else (mask.axes[1],)
