"""Reads the fields of a protobuf message in place: enough to look into an ONNX file without its weights.

The wire format is that of https://protobuf.dev/programming-guides/encoding. Nothing is copied, so that a file of two
gigabytes is walked in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10


class DamagedMessage(Exception):
    """The bytes are no protobuf message."""


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field: a varint as a number, everything else as its bytes. Raises DamagedMessage."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if kind == _BYTES:
            size, position = _varint(message, position)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise DamagedMessage(f"a field has the unknown wire type {kind}")
        if number == 0 or position + size > len(message):
            raise DamagedMessage("a field goes past the end of its message")
        yield number, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for index in range(_LONGEST_VARINT):
        if position + index >= len(message):
            raise DamagedMessage("the message is cut off")
        byte = message[position + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise DamagedMessage("a number has too many bytes")
