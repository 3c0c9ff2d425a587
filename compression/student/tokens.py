"""The corpus as token ids, and the batches of each step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from compression.student.tokenizer import END

DOCUMENTS_AT_ONCE = 256
Ids = np.ndarray[tuple[int], np.dtype[np.uint16]]


def encode_texts(texts: Iterable[str], tokenizer: Tokenizer) -> Ids:
    """All documents one after the other, each followed by the end token."""
    end = tokenizer.token_to_id(END)
    pieces: list[Ids] = []
    for batch in _batches(texts):
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            pieces.append(np.array([*encoding.ids, end], np.uint16))
    return np.concatenate(pieces)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == DOCUMENTS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def cached_ids(path: Path, texts: Iterable[str], tokenizer: Tokenizer) -> Ids:
    """As ``encode_texts``, kept in a file."""
    if not path.is_file():
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, encode_texts(texts, tokenizer), allow_pickle=False)
        partial.replace(path)
    ids: Ids = np.load(path, mmap_mode="r", allow_pickle=False)
    return ids


class Batches:
    """Windows from random places; a step's windows follow from its number alone, so that a run can go on anywhere."""

    def __init__(self, ids: Ids, sequences: int, length: int, seed: int, device: torch.device) -> None:
        self._ids = torch.from_numpy(ids.astype(np.int32)).to(device)
        self._sequences = sequences
        self._length = length
        self._seed = seed
        self._span = torch.arange(length + 1, device=device)
        self._device = device

    def step(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of a step, (sequences, length) int64."""
        rng = np.random.default_rng((self._seed, number))
        starts = torch.from_numpy(rng.integers(0, len(self._ids) - self._length, self._sequences)).to(self._device)
        windows = self._ids[starts.unsqueeze(1) + self._span].long()
        return windows[:, :-1], windows[:, 1:]


def windows_of(ids: Ids, length: int, most: int) -> torch.Tensor:
    """(windows, length + 1) int64 that do not overlap but in one token, evenly spread, at most ``most``."""
    available = (len(ids) - 1) // length
    places = np.arange(min(most, available)) * available // min(most, available)
    return torch.stack([torch.from_numpy(ids[at * length : (at + 1) * length + 1].astype(np.int64)) for at in places])
