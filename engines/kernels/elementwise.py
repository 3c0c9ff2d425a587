"""Norms, gating, rope and cache writes: one signature each, the fastest implementation that fits.

Shapes: T flat tokens of a step, Hq query heads, Hk key/value heads, D head dimension. A cache is a tuple: keys and
values, or the latents of MLA, and where they are fp8 (e4m3) their scales: (2, Hk) float32 of keys and values, (C,) of
latents. A scale is a power of two, so that to divide or multiply by it is exact.
"""

from __future__ import annotations

import torch

from engines.kernels import backends, reference
from engines.kernels.native.library import TYPE_CODES


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last dimension of (T, D) or (T, H, D), in float32, rounded once to x's dtype."""
    if backends.native is not None and x.dim() in (2, 3) and backends.fits_native(x, weight):
        return backends.native.rms_norm(x, weight, eps)
    if x.dim() in (2, 3) and (triton := backends.triton_for(x, weight)) is not None:
        return triton.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """(T, 2I) -> (T, I): ``silu(gate) * up`` with the gate in the first half."""
    if backends.native is not None and gate_up.dim() == 2 and backends.fits_native(gate_up):
        return backends.native.silu_mul(gate_up)
    if gate_up.dim() == 2 and (triton := backends.triton_for(gate_up)) is not None:
        return triton.silu_mul(gate_up)
    return reference.silu_mul(gate_up)


def rope_(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool
) -> None:
    """Rotate the first ``rope_dim`` dimensions of (T, Hq, D) and (T, Hk, D) in place.

    ``cos_sin`` is contiguous (max_pos, rope_dim) float32: cosines in the first half, sines in the second. Pairs are
    (i, i + rope_dim/2), or (2i, 2i+1) where ``interleaved``.
    """
    if backends.native is not None and backends.fits_native(queries, keys):
        backends.native.rope_(queries, keys, positions, cos_sin, interleaved)
    elif (triton := backends.triton_for(queries, keys)) is not None:
        triton.rope_(queries, keys, positions, cos_sin, interleaved)
    else:
        reference.rope_(queries, keys, positions, cos_sin, interleaved)


def rope_write_kv(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool,
    cache: tuple[torch.Tensor, ...],
    cache_slots: torch.Tensor,
) -> None:
    """``rope_``, then ``write_kv`` of the rotated keys. Queries are rotated in place; ``keys`` may stay as they are."""
    same_shape = keys.shape == values.shape and cache[0].shape == cache[1].shape
    if same_shape and (triton := backends.triton_for(queries, keys, values, *cache)) is not None:
        triton.rope_write_kv(queries, keys, values, positions, cos_sin, interleaved, cache, cache_slots)
        return
    rope_(queries, keys, positions, cos_sin, interleaved)
    write_kv(keys, values, cache, cache_slots)


def write_kv(
    keys: torch.Tensor, values: torch.Tensor, cache: tuple[torch.Tensor, ...], cache_slots: torch.Tensor
) -> None:
    """Write (T, Hk, D) keys and values into the (blocks, block_size, Hk, D) caches at (T,) slots."""
    if len(cache) > 2:
        scales = cache[2].unsqueeze(-1)
        keys, values = reference.quantize(keys, scales[0]), reference.quantize(values, scales[1])
    _write_cache(keys, cache[0], cache_slots)
    _write_cache(values, cache[1], cache_slots)


def write_latent(latent: torch.Tensor, cache: tuple[torch.Tensor, ...], cache_slots: torch.Tensor) -> None:
    """Write (T, C) latents into the (blocks, block_size, C) cache at (T,) slots."""
    if len(cache) > 1:
        latent = reference.quantize(latent, cache[1])
    _write_cache(latent, cache[0], cache_slots)


def _write_cache(entries: torch.Tensor, cache: torch.Tensor, cache_slots: torch.Tensor) -> None:
    if backends.native is not None and backends.fits_native(entries) and cache.dtype in TYPE_CODES:
        backends.native.write_cache(entries, cache, cache_slots)
    elif (triton := backends.triton_for(entries, cache)) is not None:
        triton.write_cache(entries, cache, cache_slots)
    else:
        reference.write_cache(entries, cache, cache_slots)
