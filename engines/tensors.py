"""Tensors as bytes: what a plain model takes and gives, and how it crosses between processes. Needs no numpy.

Names of data types are those of the Open Inference Protocol (KServe v2). ``BYTES`` holds strings, each as its length
in 4 bytes, little-endian, and its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

ITEM_SIZES: Mapping[str, int] = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "FP32": 4,
    "FP64": 8,
}
"""Bytes of one element; BYTES has no fixed size."""
BYTES = "BYTES"
ALIGNMENT = 64
"""Of each tensor's data in a packed message."""
SMALLEST_BUCKET = 8
GROWTH = 8
"""A length bucket is longer than the one before it by one part in so many, rounded to a multiple of 8."""


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """An input or output of a model."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """-1 for a free axis."""
    axes: tuple[str, ...]
    """For each axis the symbol of a free one, empty for a fixed one. Axes of one symbol have one size in a request."""


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """What requests of a plain model look like."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool
    """Axis 0 of each tensor is the batch: rows of several requests may share a step."""
    max_rows: int
    """Most rows of one request; 1 where nothing is batched."""
    padded: tuple[str, ...] = ()
    """Symbols of axes that are filled up to a bucket, so that requests of different lengths share a step."""

    @property
    def free_axes(self) -> tuple[str, ...]:
        """Symbols beside the batch, in the order of the inputs."""
        first = 1 if self.batched else 0
        found = [axis for spec in self.inputs for axis in spec.axes[first:] if axis]
        return tuple(dict.fromkeys(found))

    def bucket(self, sizes: Mapping[str, int]) -> int:
        """Of a request whose free axes have these sizes: only equal buckets share a step."""
        dims = [bucket_length(sizes[axis]) if axis in self.padded else sizes[axis] for axis in self.free_axes]
        if len(dims) <= 1:
            return sum(dims)
        return int.from_bytes(blake2b(repr(dims).encode(), digest_size=6).digest(), "little")


def bucket_length(length: int) -> int:
    """The bucket that a length is filled up to; at most an eighth longer, but for the shortest."""
    size = SMALLEST_BUCKET
    while size < length:
        size += max(8, size // GROWTH // 8 * 8)
    return size


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor in row-major order, little-endian."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


class _Head(msgspec.Struct, frozen=True, array_like=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    size: int


class _Heads(msgspec.Struct, frozen=True, array_like=True):
    tensors: list[_Head]
    wanted: list[str]


_decoder = msgspec.msgpack.Decoder(_Heads)
_encoder = msgspec.msgpack.Encoder()


def pack(tensors: Sequence[Tensor], wanted: Sequence[str] = ()) -> bytes:
    """Tensors as one message; ``wanted`` are the outputs asked for, none stands for all."""
    heads = [_Head(each.name, each.datatype, each.shape, len(each.data)) for each in tensors]
    header = _encoder.encode(_Heads(heads, list(wanted)))
    parts: list[bytes | memoryview] = [len(header).to_bytes(4, "little"), header, _gap(4 + len(header))]
    for tensor in tensors:
        parts += [tensor.data, _gap(len(tensor.data))]
    return b"".join(parts)


def unpack(message: bytes) -> tuple[list[Tensor], list[str]]:
    """What ``pack`` was given; the data are views of the message. Raises ValueError for anything else."""
    view = memoryview(message)
    begin = 4 + int.from_bytes(view[:4], "little")
    try:
        heads = _decoder.decode(view[4:begin])
    except msgspec.DecodeError as error:
        raise ValueError(f"no packed tensors: {error}") from error
    begin += len(_gap(begin))
    tensors = []
    for head in heads.tensors:
        if head.size < 0 or begin + head.size > len(message):
            raise ValueError("packed tensors are cut off")
        tensors.append(Tensor(head.name, head.datatype, head.shape, view[begin : begin + head.size]))
        begin += head.size + len(_gap(head.size))
    return tensors, heads.wanted


def _gap(size: int) -> bytes:
    return bytes(-size % ALIGNMENT)


def pack_strings(strings: Sequence[bytes]) -> bytes:
    """Elements of a BYTES tensor."""
    return b"".join(part for string in strings for part in (len(string).to_bytes(4, "little"), string))


def unpack_strings(data: bytes | memoryview) -> list[bytes]:
    """Raises ValueError where the lengths do not add up to the data."""
    found = []
    begin = 0
    while begin < len(data):
        end = begin + 4 + int.from_bytes(data[begin : begin + 4], "little")
        if begin + 4 > len(data) or end > len(data):
            raise ValueError("a string's length goes past the end of the data")
        found.append(bytes(data[begin + 4 : end]))
        begin = end
    return found


def elements(shape: Sequence[int]) -> int:
    return math.prod(shape)
