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


def argmax(values: torch.Tensor) -> torch.Tensor:
    """(R, V) -> (R,) int64: the place of each row's largest value, some place where a row has none."""
    if backends.native is not None and values.is_cpu and values.dtype is torch.float32 and values.stride(1) == 1:
        return backends.native.argmax(values)
    return values.argmax(dim=-1)
