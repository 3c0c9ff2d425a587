"""Noise and draws: one signature each, the fastest implementation that fits."""

from __future__ import annotations

import torch

from engines.kernels import backends, reference
from engines.kernels.cuda import shared_triton


def gumbel_noise(seeds: torch.Tensor, choices: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """(R,) int64 seeds, choices and output positions -> (R, vocab) float32 noise; the same on every backend."""
    if backends.native is not None and seeds.is_cpu:
        return backends.native.gumbel_noise(seeds.contiguous(), choices.contiguous(), positions.contiguous(), vocab)
    if seeds.is_cuda and (triton := shared_triton()) is not None:
        return triton.gumbel_noise(seeds, choices, positions, vocab)
    return reference.gumbel_noise(seeds, choices, positions, vocab)


def draw_tokens(
    logits: torch.Tensor,
    first: int,
    temperature: torch.Tensor,
    truncation: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    noise: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor | None:
    """Rows ``first`` .. S-1 of (S, V) float32 logits drawn by one kernel: (S - first,) int64 ids.

    ``truncation`` is (S,) float32 top_p (1 keeps all) and min_p and int64 top_k (0 keeps all), ``noise`` (S,) int64
    seeds, choices and positions; a row draws as ``engines.generation.sampler`` says. None where no kernel does this.
    """
    triton = backends.triton_for(logits)
    return None if triton is None else triton.draw_tokens(logits, first, temperature, truncation, noise)
