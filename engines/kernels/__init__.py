"""The operations that models and the sampler call: one signature each, the fastest implementation that fits.

The native C library serves CPU tensors in float32 and bfloat16 where it was built; everything else runs
``reference``. Shapes: T flat tokens of a step, Hq query heads, Hk key/value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from engines.kernels import reference
from engines.kernels.reference import AttentionBatch

__all__ = [
    "AttentionBatch",
    "PackedLinear",
    "add_rms_norm",
    "gumbel_noise",
    "linear",
    "mla_attention",
    "pack_linear",
    "paged_attention",
    "rms_norm",
    "rope_",
    "silu_mul",
    "write_kv",
    "write_latent",
]


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight in the layout that ``linear`` reads."""

    weight: torch.Tensor
    out_features: int
    in_features: int


def pack_linear(weight: torch.Tensor) -> PackedLinear:
    """(out, in) weight -> what ``linear`` takes; the caller may drop the plain weight."""
    return PackedLinear(weight, weight.shape[0], weight.shape[1])


def linear(x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(T, in) -> (T, out)."""
    return functional.linear(x, packed.weight, bias)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last dimension, in float32, rounded once to x's dtype."""
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + residual`` and its rms norm: (normed, new residual). The inputs stay as they are."""
    return reference.add_rms_norm(x, residual, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """(T, 2I) -> (T, I): ``silu(gate) * up`` with the gate in the first half."""
    return reference.silu_mul(gate_up)


def rope_(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool
) -> None:
    """Rotate the first ``rope_dim`` dimensions of (T, Hq, D) and (T, Hk, D) in place.

    ``cos_sin`` is (max_pos, rope_dim) float32: cosines in the first half, sines in the second. Pairs are
    (i, i + rope_dim/2), or (2i, 2i+1) where ``interleaved``.
    """
    reference.rope_(queries, keys, positions, cos_sin, interleaved)


def write_kv(
    keys: torch.Tensor, values: torch.Tensor, cache: tuple[torch.Tensor, ...], cache_slots: torch.Tensor
) -> None:
    """Write (T, Hk, D) keys and values into the (blocks, block_size, Hk, D) caches at (T,) slots."""
    reference.write_cache(keys, cache[0], cache_slots)
    reference.write_cache(values, cache[1], cache_slots)


def write_latent(latent: torch.Tensor, cache: tuple[torch.Tensor, ...], cache_slots: torch.Tensor) -> None:
    """Write (T, C) latents into the (blocks, block_size, C) cache at (T,) slots."""
    reference.write_cache(latent, cache[0], cache_slots)


def paged_attention(
    queries: torch.Tensor, cache: tuple[torch.Tensor, ...], batch: AttentionBatch, scale: float
) -> torch.Tensor:
    """Causal attention of (T, Hq, D) queries over a paged cache, this step's keys and values already written.

    The query at position p attends to positions 0 .. p of its row.
    """
    keys, values = cache
    return _attention(queries, keys, values, batch, scale)


def mla_attention(
    queries: torch.Tensor, cache: tuple[torch.Tensor, ...], batch: AttentionBatch, scale: float, value_width: int
) -> torch.Tensor:
    """Absorbed MLA: (T, H, C) queries over (blocks, block_size, C) latents -> (T, H, value_width).

    All heads share one key, the whole latent, and one value, its first ``value_width`` entries.
    """
    latents = cache[0].unsqueeze(2)
    return _attention(queries, latents, latents[..., :value_width], batch, scale)


def _attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: AttentionBatch, scale: float
) -> torch.Tensor:
    if queries.device.type == "cpu":
        return reference.attention(queries, keys, values, batch, scale)
    return reference.padded_attention(queries, keys, values, batch, scale)


def gumbel_noise(seeds: torch.Tensor, choices: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """(R,) int64 seeds, choices and output positions -> (R, vocab) float32 noise; the same on every backend."""
    return reference.gumbel_noise(seeds, choices, positions, vocab)
