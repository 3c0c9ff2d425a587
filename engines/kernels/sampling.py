"""Noise of the draws: one signature, the fastest implementation that fits."""

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
