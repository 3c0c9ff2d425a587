"""Rotary position tables: the angles are a field of the config, the rotation itself is a kernel."""

from __future__ import annotations

import math

import torch

from engines.models.config import RopeConfig


def cos_sin_table(rope: RopeConfig, positions: int, device: torch.device) -> torch.Tensor:
    """(positions, dim) float32: cosines in the first half, sines in the second."""
    frequencies, scale = _frequencies(rope)
    angles = torch.arange(positions, dtype=torch.float32).unsqueeze(1) * frequencies
    table = torch.empty(positions, rope.dim)
    torch.cos(angles, out=table[:, : rope.dim // 2])
    torch.sin(angles, out=table[:, rope.dim // 2 :])
    return table.mul_(scale).to(device)


def table_bytes(rope: RopeConfig, positions: int) -> int:
    """Memory of ``cos_sin_table``."""
    return positions * rope.dim * torch.float32.itemsize


def softmax_gain(rope: RopeConfig) -> float:
    """What DeepSeek multiplies the softmax scale by where positions are stretched."""
    if rope.kind == "default" or not rope.mscale_all_dim:
        return 1.0
    return _mscale(rope.factor, rope.mscale_all_dim) ** 2


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _frequencies(rope: RopeConfig) -> tuple[torch.Tensor, float]:
    """(dim / 2,) float32 angles of one position, and the factor on cosines and sines."""
    plain = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "divisors":
        return plain / torch.tensor(rope.divisors, dtype=torch.float32), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, plain), _yarn_attention_factor(rope)
    return plain, 1.0


def _llama3(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Slow frequencies are divided, fast ones kept, and those between go over from one to the other."""
    turns = rope.trained_positions * plain / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return plain * kept + plain / rope.factor * (1 - kept)


def _yarn(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """As llama3, with the way between laid over dimensions instead of frequencies."""

    def dimension(turns: float) -> float:
        """The dimension that turns so often over the positions of training."""
        return rope.dim * math.log(rope.trained_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low if high != low else 0.001
    divided = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain * (1 - divided) + plain / rope.factor * divided


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)
