"""Tensors between JSON and bytes."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from engines.tensors import BYTES, Tensor, elements, pack_strings, unpack_strings
from server.errors import InvalidRequest

DEEPEST = 16
"""Axes of a tensor."""
_CODES: Mapping[str, str] = {
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP32": "f",
    "FP64": "d",
}
_LARGEST_FP16, _LARGEST_FP32 = 65504.0, 3.4028234663852886e38


def from_json(name: str, datatype: str, shape: Sequence[int], data: Any) -> bytes:
    """The bytes of a tensor that is a flat or nested list. Raises InvalidRequest that names the input."""
    flat: list[Any] = []
    _flatten(name, data, flat, 0)
    if len(flat) != elements(shape):
        raise _wrong(name, f"its shape {list(shape)} has {elements(shape)} elements, and data has {len(flat)}")
    try:
        return _encode(datatype, flat)
    except OverflowError:
        raise _wrong(name, f"a number does not fit into {datatype}") from None
    except (TypeError, ValueError, struct.error):
        raise _wrong(name, f"data must be a list of values of the type {datatype}") from None


def _flatten(name: str, data: Any, flat: list[Any], depth: int) -> None:
    if not isinstance(data, list) or depth >= DEEPEST:
        raise _wrong(name, "data must be a list, or lists in lists")
    if not data or not isinstance(data[0], list):
        flat.extend(data)
        return
    if any(not isinstance(part, list) or len(part) != len(data[0]) for part in data):
        raise _wrong(name, "the lists in data must have one length")
    for part in data:
        _flatten(name, part, flat, depth + 1)


def _encode(datatype: str, flat: list[Any]) -> bytes:
    if datatype == BYTES:
        return pack_strings([each.encode() for each in _all_of(str, flat)])
    if datatype == "BOOL":
        return bytes(_all_of(bool, flat))
    if True in flat and any(each is True for each in flat):
        raise TypeError
    if False in flat and any(each is False for each in flat):
        raise TypeError
    if datatype == "FP16":
        return struct.pack(f"<{len(flat)}e", *flat)
    if datatype == "FP32" and flat and max(map(abs, flat)) > _LARGEST_FP32:
        raise OverflowError
    return array(_CODES[datatype], flat).tobytes()


def _all_of(kind: type, flat: list[Any]) -> list[Any]:
    if any(type(each) is not kind for each in flat):
        raise TypeError
    return flat


def to_json(tensor: Tensor) -> list[Any]:
    """The elements as a flat list. NaN and infinities become null in JSON, which has none."""
    if tensor.datatype == BYTES:
        return [each.decode(errors="replace") for each in unpack_strings(tensor.data)]
    if tensor.datatype == "FP16":
        return [each for (each,) in struct.iter_unpack("<e", tensor.data)]
    if tensor.datatype == "BOOL":
        return [bool(each) for each in bytes(tensor.data)]
    numbers = array(_CODES[tensor.datatype])
    numbers.frombytes(tensor.data)
    return numbers.tolist()


def _wrong(name: str, text: str) -> InvalidRequest:
    return InvalidRequest(f"input {name[:80]!r}: {text}", param=name[:80])
