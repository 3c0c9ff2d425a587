"""How near a model's next-token distributions are to its base's, token by token over the same passages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from compression.errors import CompressionError
from compression.progress import PartReport
from engines.generation.whole_prompts import WholePrompts
from engines.models.model import Model

STORED_TOKENS = 64
"""Of each stored distribution: its likeliest tokens. The rest counts as one."""
LOGITS_BYTES = 64 << 20
"""Of one block of logits; several such are alive at once."""

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Passage:
    """``tokens[first:]`` are scored, each after all before it; ``first`` is at least 1."""

    tokens: Sequence[int]
    first: int = 1

    @property
    def scored(self) -> int:
        return len(self.tokens) - self.first


@dataclass(frozen=True, slots=True)
class Distributions:
    """Next-token log probabilities at n positions."""

    logprobs: torch.Tensor
    """(n, vocab) float32, or (n, STORED_TOKENS) best first."""
    ids: torch.Tensor | None
    """(n, STORED_TOKENS) int64: whose they are; None: all."""
    following: torch.Tensor
    """(n,) log probability of the token that does follow."""

    @property
    def best(self) -> torch.Tensor:
        """(n,) the likeliest token."""
        return self.logprobs.argmax(-1) if self.ids is None else self.ids[:, 0]


class Source(Protocol):
    """Gives a model's distributions over one passage after the other."""

    def begin(self, index: int, passage: Passage) -> None:
        """``passage`` is number ``index``."""

    def rows(self, start: int, stop: int) -> Distributions:
        """At the scored tokens ``start .. stop-1`` of the passage."""


class LiveModel:
    """A loaded model."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        self._model = model
        self._prompts = WholePrompts(model, device, dtype)
        self._device = device

    def begin(self, index: int, passage: Passage) -> None:
        self._hidden = self._prompts.hidden([passage.tokens[:-1]])[passage.first - 1 :]
        self._following = torch.tensor(passage.tokens[passage.first :], device=self._device)

    def rows(self, start: int, stop: int) -> Distributions:
        logprobs = self._model.logits(self._hidden[start:stop]).log_softmax(-1)
        return Distributions(logprobs, None, logprobs.gather(1, self._following[start:stop, None]).squeeze(1))


class StoredModel:
    """Distributions of a model that is no longer in memory: the likeliest tokens of each, in files of a folder."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._device = device

    def begin(self, index: int, passage: Passage) -> None:
        self._ids, self._logprobs, self._following = (
            torch.from_numpy(np.load(self._folder / f"{index}-{part}.npy")).to(self._device)
            for part in ("ids", "logprobs", "following")
        )

    def rows(self, start: int, stop: int) -> Distributions:
        part = slice(start, stop)
        return Distributions(self._logprobs[part], self._ids[part].long(), self._following[part])


@dataclass(frozen=True, slots=True)
class Scores:
    """One entry a passage, sums over its scored tokens; natural logarithms."""

    tokens: Floats
    own_loss: Floats
    """Negative log likelihood."""
    base_loss: Floats
    divergence: Floats
    """Kullback-Leibler divergence of the base's distribution from ours."""
    same_best: Floats
    """Tokens at which both models' likeliest one is the same."""


def compare(
    own: Source, base: Source, passages: Sequence[Passage], vocab: int, what: str, report: PartReport
) -> Scores:
    """Score all passages under both models; ``report`` counts passages.

    Raises CompressionError where a model gives something else than probabilities.
    """
    sums = np.zeros((5, len(passages)), np.float64)
    for index, passage in enumerate(passages):
        report(what, index, len(passages))
        own.begin(index, passage)
        base.begin(index, passage)
        sums[0, index] = passage.scored
        for start, stop in _blocks(passage.scored, vocab):
            ours, theirs = own.rows(start, stop), base.rows(start, stop)
            sums[1, index] -= float(ours.following.double().sum())
            sums[2, index] -= float(theirs.following.double().sum())
            sums[3, index] += float(divergence(theirs, ours.logprobs).double().sum())
            sums[4, index] += int((ours.best == theirs.best).sum())
    report(what, len(passages), len(passages))
    if not np.isfinite(sums).all():
        raise CompressionError(
            "the model's probabilities are not numbers (NaN or infinite); compress it again, with a recipe of more bits"
        )
    return Scores(*sums)


def store(live: Source, passages: Sequence[Passage], vocab: int, folder: Path, what: str, report: PartReport) -> None:
    """Write what ``StoredModel`` reads: 8 bytes for each of STORED_TOKENS tokens at each position."""
    for index, passage in enumerate(passages):
        report(what, index, len(passages))
        live.begin(index, passage)
        parts = []
        for start, stop in _blocks(passage.scored, vocab):
            rows = live.rows(start, stop)
            best, ids = rows.logprobs.topk(min(STORED_TOKENS, vocab), dim=-1)
            parts.append((ids.int().cpu(), best.cpu(), rows.following.cpu()))
        for name, column in zip(("ids", "logprobs", "following"), zip(*parts, strict=True), strict=True):
            np.save(folder / f"{index}-{name}.npy", torch.cat(column).numpy(), allow_pickle=False)


@torch.inference_mode()
def divergence(base: Distributions, own: torch.Tensor) -> torch.Tensor:
    """(n,) KL(base || own) in nats; ``own`` (n, vocab) log probabilities.

    Of a stored base the tokens beyond the stored ones count as one, on both sides. By the log-sum inequality the
    result is then at most the true divergence.
    """
    if base.ids is None:
        return (base.logprobs.exp() * (base.logprobs - own)).sum(-1)
    kept = own.gather(1, base.ids)
    rest_base, rest_own = _rest(base.logprobs), _rest(kept)
    within = (base.logprobs.exp() * (base.logprobs - kept)).sum(-1)
    return within + rest_base * (rest_base.log() - rest_own.log())


def _rest(logprobs: torch.Tensor) -> torch.Tensor:
    """Probability outside the given tokens; what rounding leaves of nothing is a little more than nothing."""
    return (1 - logprobs.double().exp().sum(-1)).clamp_min(1e-9).float()


def _blocks(count: int, vocab: int) -> list[tuple[int, int]]:
    size = max(1, LOGITS_BYTES // (4 * vocab))
    return [(start, min(start + size, count)) for start in range(0, count, size)]
