"""Draws one token a row, vectorised over the batch, without a generator state.

A row's order of work, each part only where the row asks for it: logit bias, repetition then frequency and presence
penalties, stop ids masked below ``min_tokens``; greedy rows take the best logit; the others divide by the
temperature, rule tokens out by min-p, top-k and top-p, add Gumbel noise and take the best sum, which draws from the
softmax of what is left. A row's token depends on its own logits and parameters alone: every operation here is
elementwise or works along one row, and a row runs the same operations whatever its neighbours ask for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.generation.truncation import min_p_threshold, top_k_threshold, top_p_threshold
from engines.kernels import argmax, gumbel_noise

GREEDY, PLAIN, MIN_P, TOP_K, TOP_K_TOP_P, TOP_P = range(6)
"""How a row draws; rows are sorted by this, so that each operation works on one slice."""


@dataclass(frozen=True, slots=True)
class Noise:
    """What the noise of S rows is a function of, each (S,) int64; seeds as the bits of an unsigned number."""

    seeds: torch.Tensor
    choices: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, slots=True)
class Draws:
    """How S rows draw, sorted by kind."""

    kind_starts: tuple[int, ...]
    """Rows of kind k are ``kind_starts[k] .. kind_starts[k+1]-1``."""
    noise: Noise
    temperature: torch.Tensor
    """(S,) float32, like ``top_p`` and ``min_p``."""
    top_p: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    """(S,) int64; 0 where it keeps all."""
    largest_top_k: int
    any_min_p: bool


def draw(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """(S, V) float32 logits, penalties applied -> (S,) int64 token ids.

    A row of NaN or infinite logits gets some valid id.
    """
    plain, rows = draws.kind_starts[PLAIN], logits.shape[0]
    if plain == rows:
        return argmax(logits)
    drawn = _draw_noisily(logits, draws, plain)
    return torch.cat((argmax(logits[:plain]), drawn)) if plain else drawn


def _draw_noisily(logits: torch.Tensor, draws: Draws, plain: int) -> torch.Tensor:
    """The rows from ``plain`` on, the first that is not greedy."""
    noise = draws.noise
    scores = logits[plain:] / draws.temperature[plain:].unsqueeze(1)
    truncated = draws.kind_starts[MIN_P] - plain
    if truncated < scores.shape[0]:
        _rule_out(scores[truncated:], draws)
    scores += gumbel_noise(noise.seeds[plain:], noise.choices[plain:], noise.positions[plain:], logits.shape[1])
    return argmax(scores)


def _rule_out(scaled: torch.Tensor, draws: Draws) -> None:
    """Set what min-p, top-k and top-p exclude to -inf, in place. ``scaled`` starts at the first row of MIN_P."""
    first = draws.kind_starts[MIN_P]
    if draws.any_min_p:
        _keep(scaled, min_p_threshold(scaled, draws.min_p[first:]))
    by_k = slice(draws.kind_starts[TOP_K], draws.kind_starts[TOP_P])
    if by_k.start < by_k.stop:
        ranked = scaled[by_k.start - first : by_k.stop - first]
        _keep(ranked, top_k_threshold(ranked, draws.top_k[by_k], draws.largest_top_k))
    by_p = draws.kind_starts[TOP_K_TOP_P]
    if by_p < draws.kind_starts[-1]:
        nucleus = scaled[by_p - first :]
        _keep(nucleus, top_p_threshold(nucleus, draws.top_p[by_p:]))


def _keep(scaled: torch.Tensor, threshold: torch.Tensor) -> None:
    """Set what is below its row's threshold to -inf, in place."""
    scaled.masked_fill_(scaled < threshold.unsqueeze(1), float("-inf"))
