"""The header of a ``.safetensors`` file: names, types and places of its tensors, checked against the file's size."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any, TypeGuard

import msgspec

from engines.protocol import EngineLoadError

LARGEST_HEADER = 100 << 20
"""Bytes; the format's own limit."""

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}


class SafetensorsTensor(msgspec.Struct, frozen=True):
    """One tensor of a file; ``dtype`` as the format writes it."""

    dtype: str
    shape: tuple[int, ...]


class SafetensorsHeader(msgspec.Struct, frozen=True, kw_only=True):
    tensors: dict[str, SafetensorsTensor]
    digest: bytes
    """SHA-256 of the header's bytes."""


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Read and check one file's header.

    Raises EngineLoadError if the file is cut short, too long, or its header does not describe it.
    """
    damaged = f"{path.name} is damaged or was not downloaded in full; fetch it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, LARGEST_HEADER):
                raise EngineLoadError(f"{damaged} (its header ends past the end of the file)")
            raw = file.read(length)
    except OSError as error:
        raise EngineLoadError(f"{path.name} cannot be read: {error.strerror}") from error
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise EngineLoadError(f"{damaged} (its header is not JSON)") from error
    if not isinstance(entries, dict):
        raise EngineLoadError(f"{damaged} (its header is not an object)")
    entries.pop("__metadata__", None)
    tensors = {}
    end = 0
    for name, entry in entries.items():
        tensor, stop = _read_entry(entry)
        if tensor is None:
            raise EngineLoadError(f"{damaged} (the header's entry for {name[:100]} is wrong)")
        tensors[name] = tensor
        end = max(end, stop)
    if end != size - 8 - length:
        raise EngineLoadError(f"{damaged} ({size} bytes, the header describes {end + 8 + length})")
    return SafetensorsHeader(tensors=tensors, digest=hashlib.sha256(raw).digest())


def _read_entry(entry: Any) -> tuple[SafetensorsTensor | None, int]:
    """The tensor and the end of its bytes in the data part; None where the entry contradicts itself."""
    if not isinstance(entry, dict):
        return None, 0
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _whole_numbers(shape) or not _whole_numbers(offsets):
        return None, 0
    if dtype not in ITEM_BYTES or len(offsets) != 2 or len(shape) > 8:
        return None, 0
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        return None, 0
    return SafetensorsTensor(dtype, tuple(shape)), offsets[1]


def _whole_numbers(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)
