"""The key-value header of a GGUF file, without the tensors: some 60 ms where ``gguf.GGUFReader`` takes seconds.

Both processes read it at start: the API process for tokenizer and template, the worker for the configuration.
Every length in the file is checked against the file's size before anything is allocated.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from engines.protocol import EngineLoadError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9
_VERSIONS = (2, 3)


class _Header:
    """A cursor over the mapped file. All reads raise EngineLoadError at the file's end."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data = data
        self.name = name
        self.position = 0

    def broken(self, what: str) -> EngineLoadError:
        return EngineLoadError(f"{self.name} is not a readable GGUF file: {what}. Download it again.")

    def take(self, size: int) -> int:
        """Move past ``size`` bytes and return where they begin."""
        start = self.position
        if size > len(self.data) - start:
            raise self.broken(f"it ends at byte {len(self.data)}, inside its header")
        self.position = start + size
        return start

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code)))
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        start = self.take(size)
        # A vocabulary may hold bytes that are no UTF-8; such an entry can never be matched by a text.
        return self.data[start : start + size].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise self.broken(f"unknown value type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            self.take(8 * count)  # each string has at least its length: a huge count fails here, not in the loop
            self.position -= 8 * count
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise self.broken(f"array of type {kind}")
        code = _SCALARS[kind]
        start = self.take(count * struct.calcsize("<" + code))
        return list(struct.unpack_from(f"<{count}{code}", self.data, start))


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """All keys of the header with plain Python values. Raises EngineLoadError for a file that is none or is cut."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Header(data, path.name)
            if data[:4] != b"GGUF":
                raise header.broken("the first four bytes are not GGUF")
            header.position = 4
            version = header.scalar("I")
            if version not in _VERSIONS:
                raise header.broken(f"version {version} is not supported (2 and 3 are)")
            header.scalar("Q")  # number of tensors
            metadata: dict[str, Any] = {}
            for _ in range(header.scalar("Q")):
                key = header.string()
                metadata[key] = header.value(header.scalar("I"))
            return metadata
    except ValueError as error:  # mmap of an empty file
        raise EngineLoadError(f"{path.name} is empty. Download it again.") from error
    except OSError as error:
        raise EngineLoadError(f"{path.name} cannot be read: {error.strerror}.") from error
