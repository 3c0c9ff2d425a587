"""The header of a ``.gguf`` file: metadata, and types and places of its tensors, checked against the file's size.

Written here rather than taken from the ``gguf`` package, whose reader trusts the counts in the file and builds an
array object for each token of the vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import msgspec

from engines.protocol import EngineLoadError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4

TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
"""The types that we read: name, weights in a block, bytes of a block, by the format's number."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9


class GgufTensor(msgspec.Struct, frozen=True):
    """One tensor; ``shape`` in row-major order (the file's is reversed), ``offset`` from the start of the file."""

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GgufHeader(msgspec.Struct, frozen=True, kw_only=True):
    metadata: dict[str, Any]
    """Numbers, strings, and lists of them, by the file's own keys."""
    tensors: dict[str, GgufTensor]
    digest: bytes
    """SHA-256 of the header's bytes."""


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header. About 0.2 s for a vocabulary of 150,000.

    Raises EngineLoadError if the file is no GGUF file, is cut short, contradicts itself, or holds a tensor type
    that is not in ``TENSOR_TYPES``.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise EngineLoadError(f"{path.name} is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data, path.name).read()
    except OSError as error:
        raise EngineLoadError(f"{path.name} cannot be read: {error.strerror}") from error


class _Reader:
    """Walks through the header once. Every count is held against the bytes that are left before it is believed."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data = data
        self.name = name
        self.at = len(MAGIC)

    def damaged(self, what: str) -> EngineLoadError:
        return EngineLoadError(f"{self.name} is damaged or was not downloaded in full; fetch it again ({what})")

    def read(self) -> GgufHeader:
        version = self.scalar("I")
        if version not in VERSIONS:
            raise EngineLoadError(f"{self.name} has GGUF version {version}; versions 2 and 3 (little-endian) are read")
        tensor_count = self.checked_count(self.scalar("Q"), least_bytes=24)
        pair_count = self.checked_count(self.scalar("Q"), least_bytes=13)
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self.string()
            if key in metadata:
                raise self.damaged(f"the key {key[:80]} is there twice")
            metadata[key] = self.value(key)
        places = self.tensor_infos(tensor_count)
        digest = hashlib.sha256(self.data[: self.at]).digest()
        return GgufHeader(metadata=metadata, tensors=self.place_tensors(metadata, places), digest=digest)

    def take(self, size: int) -> int:
        """Move on by ``size`` bytes and return where they begin."""
        start = self.at
        if size > len(self.data) - start:
            raise self.damaged("it ends inside its header")
        self.at = start + size
        return start

    def checked_count(self, count: int, least_bytes: int) -> int:
        if count > (len(self.data) - self.at) // least_bytes:
            raise self.damaged("a count in its header is larger than the file")
        return count

    def scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.take(length)
        # A vocabulary may hold bytes that are no UTF-8; such an entry can never be matched by a text.
        return self.data[start : start + length].decode(errors="replace")

    def value(self, key: str) -> Any:
        kind = self.scalar("I")
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.damaged(f"{key[:80]} has an unknown type")
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            return [self.string() for _ in range(self.checked_count(count, least_bytes=8))]
        if kind not in _SCALARS:
            raise self.damaged(f"{key[:80]} has an unknown type")
        code = _SCALARS[kind]
        start = self.take(self.checked_count(count, least_bytes=1) * struct.calcsize("<" + code))
        return list(struct.unpack_from(f"<{count}{code}", self.data, start))

    def tensor_infos(self, count: int) -> dict[str, tuple[int, tuple[int, ...], int]]:
        """Type number, shape and offset in the data part, by name."""
        places = {}
        for _ in range(count):
            name = self.string()
            dimensions = self.scalar("I")
            if name in places or not 1 <= dimensions <= MOST_DIMENSIONS:
                raise self.damaged(f"the entry of tensor {name[:80]} is wrong")
            shape = tuple(reversed([self.scalar("Q") for _ in range(dimensions)]))
            places[name] = (self.scalar("I"), shape, self.scalar("Q"))
        return places

    def place_tensors(
        self, metadata: dict[str, Any], places: dict[str, tuple[int, tuple[int, ...], int]]
    ) -> dict[str, GgufTensor]:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged("general.alignment is no power of two")
        base = -(-self.at // alignment) * alignment
        tensors = {}
        for name, (number, shape, offset) in places.items():
            if number not in TENSOR_TYPES:
                known = ", ".join(kind for kind, _, _ in TENSOR_TYPES.values())
                raise EngineLoadError(
                    f"{self.name}: tensor {name[:80]} has the quantization type number {number}, which is not read; "
                    f"use a file with {known}"
                )
            kind, block, block_bytes = TENSOR_TYPES[number]
            nbytes = math.prod(shape) // block * block_bytes
            if shape[-1] % block or offset % alignment or base + offset + nbytes > len(self.data):
                raise self.damaged(f"tensor {name[:80]} does not fit into the file")
            tensors[name] = GgufTensor(kind, shape, base + offset, nbytes)
        return tensors
