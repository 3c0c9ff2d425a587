"""Calibration text: a file or a folder of files -> windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from compression.errors import CompressionError
from engines.manifest import Manifest
from server.text.model_text import load_text

DEFAULT_TEXT = Path(__file__).resolve().parents[1].parent / "shared/data/text/gsm8k-train-2000.jsonl"
"""Worked problems, read where no text is given and these are here."""
SUFFIXES = (".txt", ".md", ".jsonl", ".rst")
"""Files that are taken from a folder."""
LARGEST_FILE = 1 << 30
"""Bytes."""
PIECE = 1 << 16
"""Characters that are tokenized at once."""

Encode = Callable[[str], list[int]]


def text_source(given: Path | None, recipe: str) -> Path:
    """The text to read: what the user gave, else the one that is here. Raises CompressionError where there is none."""
    source = DEFAULT_TEXT if given is None and DEFAULT_TEXT.is_file() else given
    if source is None:
        raise CompressionError(
            f"the recipe {recipe} is calibrated: give --calibration FILE, some hundred kB of text of the kind that the "
            "model will see"
        )
    return source


def text_tokens(source: Path, manifest: Manifest, windows: int, tokens: int) -> torch.Tensor:
    """As ``calibration_windows``, by the model's own tokenizer."""
    text = load_text(manifest)
    try:

        def encode(part: str) -> list[int]:
            return text.encode(part, False, max_tokens=len(part) + 8)

        return calibration_windows(source, encode, windows, tokens)
    finally:
        text.close()


def calibration_windows(source: Path, encode: Encode, windows: int, tokens: int) -> torch.Tensor:
    """(N, tokens) int64 with N at most ``windows``, spread evenly over the text.

    Each line of a ``.jsonl`` file gives all its strings. Raises CompressionError for text that is missing, not UTF-8,
    or shorter than one window.
    """
    texts = list(_texts(source))
    ids = [token for text in texts for token in _encoded(text, encode)]
    if len(ids) < tokens:
        raise CompressionError(
            f"the calibration text {source.name} has {len(ids)} tokens, and one window takes {tokens}; give more text, "
            "or set calibration.tokens lower in the recipe"
        )
    available = len(ids) // tokens
    count = min(windows, available)
    whole = torch.tensor(ids[: available * tokens]).view(available, tokens)
    places = torch.arange(count) * available // count
    return whole[places].clone()


def _encoded(text: str, encode: Encode) -> Iterator[int]:
    """In pieces, cut at a line's end where there is one."""
    start = 0
    while start < len(text):
        end = min(start + PIECE, len(text))
        if end < len(text):
            cut = text.rfind("\n", start, end)
            end = cut + 1 if cut > start else end
        yield from encode(text[start:end])
        start = end


def _texts(source: Path) -> Iterator[str]:
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix in SUFFIXES and path.is_file())
        if not files:
            raise CompressionError(f"the folder {source.name} has no text to calibrate on ({', '.join(SUFFIXES)})")
    elif source.is_file():
        files = [source]
    else:
        raise CompressionError(f"there is no calibration text {source.name}")
    for path in files:
        text = _read(path)
        yield "\n".join(_strings(text, path.name)) + "\n" if path.suffix == ".jsonl" else text


def _read(path: Path) -> str:
    if path.stat().st_size > LARGEST_FILE:
        raise CompressionError(f"{path.name} is larger than {LARGEST_FILE >> 30} GB; give a part of it")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CompressionError(f"{path.name} is no UTF-8 text; calibration needs text as people write it") from error
    except OSError as error:
        raise CompressionError(f"{path.name} cannot be read: {error.strerror}") from error
    if "\0" in text:
        raise CompressionError(f"{path.name} is a binary file; calibration needs text as people write it")
    if not text.strip():
        raise CompressionError(f"{path.name} is empty; calibration needs text as people write it")
    return text


def _strings(text: str, name: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CompressionError(f"{name}: line {number} is not JSON") from error
        fields = value.values() if isinstance(value, dict) else [value]
        strings = [field for field in fields if isinstance(field, str)]
        if strings:
            yield "\n".join(strings)
