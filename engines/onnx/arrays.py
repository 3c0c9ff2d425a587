"""Between packed tensors and the arrays of one step: rows concatenated, padded to their bucket, and split again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.tensors import BYTES, Signature, Tensor, TensorSpec, bucket_length, pack, pack_strings, unpack
from engines.tensors import unpack_strings as split_strings

Array = NDArray[Any]

DTYPES: Mapping[str, Any] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    BYTES: np.object_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


@dataclass(slots=True)
class Inputs:
    """What one item brings: arrays by input, and the outputs that its client wants (none: all)."""

    arrays: dict[str, Array]
    wanted: list[str]


def read_inputs(message: bytes) -> Inputs:
    """Of what ``pack`` made. Raises ValueError for anything else."""
    tensors, wanted = unpack(message)
    return Inputs({tensor.name: _array(tensor) for tensor in tensors}, wanted)


def _array(tensor: Tensor) -> Array:
    if tensor.datatype == BYTES:
        strings = [each.decode(errors="replace") for each in split_strings(tensor.data)]
        return np.array(strings, dtype=np.object_).reshape(tensor.shape)
    return np.frombuffer(tensor.data, dtype=DTYPES[tensor.datatype]).reshape(tensor.shape)


def write_outputs(arrays: Mapping[str, Array], wanted: Sequence[str]) -> bytes:
    """One message of the wanted outputs, or of all."""
    return pack([_tensor(name, array) for name, array in arrays.items() if not wanted or name in wanted])


def _tensor(name: str, array: Array) -> Tensor:
    if array.dtype == np.object_ or array.dtype.kind == "U":
        data = pack_strings([str(each).encode() for each in array.reshape(-1)])
        return Tensor(name, BYTES, array.shape, data)
    whole = np.ascontiguousarray(array)
    return Tensor(name, _NAMES[whole.dtype], array.shape, whole.reshape(-1).view(np.uint8).data)


class StepArrays:
    """The arrays of one step: each item's rows behind those of the one before, in the items' common bucket."""

    def __init__(self, signature: Signature, items: Sequence[Mapping[str, Array]], rows: int) -> None:
        """``rows`` of the step, with the blank ones."""
        self._signature = signature
        self._items = items
        self._counts = [_rows(signature, item) for item in items]
        self._rows = max(rows, sum(self._counts))
        self._padded_sizes: dict[str, int] = {}
        self.inputs = {spec.name: self._gather(spec) for spec in signature.inputs}

    def _gather(self, spec: TensorSpec) -> Array:
        arrays = [item[spec.name] for item in self._items]
        shape = self._shape(spec, arrays)
        if len(arrays) == 1 and arrays[0].shape == shape and arrays[0].flags.aligned:
            return arrays[0]
        whole = np.zeros(shape, arrays[0].dtype) if spec.datatype != BYTES else np.full(shape, "", np.object_)
        begin = 0
        for array, count in zip(arrays, self._counts, strict=True):
            place = (slice(begin, begin + count), *(slice(size) for size in array.shape[1:]))
            whole[place if self._signature.batched else ...] = array
            begin += count
        return whole

    def _shape(self, spec: TensorSpec, arrays: Sequence[Array]) -> tuple[int, ...]:
        sizes = list(arrays[0].shape)
        for index, axis in enumerate(spec.axes):
            if axis in self._signature.padded:
                sizes[index] = bucket_length(max(array.shape[index] for array in arrays))
                self._padded_sizes[axis] = sizes[index]
        if self._signature.batched:
            sizes[0] = self._rows
        return tuple(sizes)

    @property
    def padding(self) -> float:
        """Share of the input elements that are there for nobody."""
        total = sum(array.size for array in self.inputs.values())
        own = sum(math.prod(item[spec.name].shape) for spec in self._signature.inputs for item in self._items)
        return 1 - own / total if total else 0.0

    def split(self, outputs: Mapping[str, Array]) -> list[dict[str, Array]]:
        """The outputs of each item, without the rows and the lengths of others."""
        found = []
        begin = 0
        for item, count in zip(self._items, self._counts, strict=True):
            rows = slice(begin, begin + count)
            found.append(
                {spec.name: self._cut(spec, outputs[spec.name], item, rows) for spec in self._signature.outputs}
            )
            begin += count
        return found

    def _cut(self, spec: TensorSpec, output: Array, item: Mapping[str, Array], rows: slice) -> Array:
        if self._signature.batched:
            output = output[rows]
        for index, axis in enumerate(spec.axes):
            if axis in self._padded_sizes and output.shape[index] == self._padded_sizes[axis]:
                output = output[(slice(None),) * index + (slice(_length(self._signature, item, axis)),)]
        return output


def _rows(signature: Signature, item: Mapping[str, Array]) -> int:
    return int(item[signature.inputs[0].name].shape[0]) if signature.batched else 1


def _length(signature: Signature, item: Mapping[str, Array], axis: str) -> int:
    """Of this item, along an axis of its inputs."""
    spec = next(spec for spec in signature.inputs if axis in spec.axes)
    return int(item[spec.name].shape[spec.axes.index(axis)])
