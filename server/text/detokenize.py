"""Token ids to text, a few at a time, without ever giving out half a character."""

from __future__ import annotations

import re
from codecs import utf_8_decode
from collections.abc import Collection, Sequence
from typing import Protocol

from tokenizers import Tokenizer, decoders

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _alphabet() -> dict[int, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, the rest for code points from 256 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + index: byte for index, byte in enumerate(others)}


BYTE_OF_CHAR = _alphabet()


class _ByteOfChar(dict[int, int]):
    """For ``str.translate``: a character outside the alphabet becomes one that Latin-1 lacks."""

    def __missing__(self, char: int) -> int:
        return 0x100


_BYTE_OF_CHAR = _ByteOfChar(BYTE_OF_CHAR)


class IncrementalDetokenizer(Protocol):
    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; an unfinished character waits for the next call."""

    def flush(self) -> str:
        """What is left once the tokens have ended: replacement characters for an unfinished character."""


def token_table(tokenizer: Tokenizer, size: int) -> list[bytes]:
    """The bytes of each id below ``size``; ids that the tokenizer does not know have none.

    For a byte-level tokenizer the text of any sequence is its bytes joined and decoded. For others (sentencepiece with
    byte fallback) this holds for all but a blank at the beginning.
    """
    to_bytes = _byte_level_bytes if is_byte_level(tokenizer) else _sentencepiece_bytes
    table = [to_bytes(tokenizer.id_to_token(id) or "") for id in range(size)]
    for id, token in tokenizer.get_added_tokens_decoder().items():
        if id < size:
            table[id] = token.content.encode()
    return table


def is_byte_level(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer.decoder, decoders.ByteLevel)


def _byte_level_bytes(token: str) -> bytes:
    if token.isascii() and token.isprintable() and " " not in token:
        return token.encode()
    try:
        return token.translate(_BYTE_OF_CHAR).encode("latin-1")
    except UnicodeEncodeError:  # an entry outside the byte alphabet stands for itself
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    if match:
        return bytes.fromhex(match[1])
    return token.replace("▁", " ").encode()


class ByteDetokenizer:
    """For byte-level tokenizers: a table look-up and an incremental UTF-8 decoder; invalid bytes become U+FFFD."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._rest = b""

    def push(self, ids: Sequence[int]) -> str:
        table = self._table
        data = table[ids[0]] if len(ids) == 1 else b"".join([table[id] for id in ids])
        if self._rest:
            data = self._rest + data
        text, used = utf_8_decode(data, "replace", False)
        self._rest = data[used:]
        return text

    def flush(self) -> str:
        text, _ = utf_8_decode(self._rest, "replace", True)
        self._rest = b""
        return text


class WindowDetokenizer:
    """For every other tokenizer: decodes a window of the last tokens with and without the new ones.

    Slower (some 10 us a token). Where a run of byte tokens turns invalid only after its first character was given out,
    that character stays, while the tokenizer's decode of the whole would take it back.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._window: list[int] = []
        self._context = 0
        """Tokens at the window's start whose text was given out."""
        self._given = 0
        """Characters of that text."""

    def push(self, ids: Sequence[int]) -> str:
        fresh = [id for id in ids if id not in self._skipped]
        if not fresh:
            return ""
        self._window += fresh
        text = self._decode(self._window)
        if text.endswith("\ufffd"):
            return ""
        new = text[self._given :]
        self._window = self._window[self._context :]
        self._context = len(self._window)
        self._given = len(self._decode(self._window))
        return new

    def flush(self) -> str:
        new = self._decode(self._window)[self._given :]
        self._window, self._context, self._given = [], 0, 0
        return new

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text
