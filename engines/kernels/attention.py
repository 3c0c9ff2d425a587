"""Attention over paged caches: one signature each, the fastest implementation that fits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.kernels import backends, reference
from engines.kernels.elementwise import rope_write_kv
from engines.kernels.linear import RmsNorm
from engines.kernels.native.library import TYPE_CODES
from engines.kernels.reference import AttentionBatch


@dataclass(frozen=True, slots=True)
class GroupedQueries:
    """What the fused attention of one layer is a function of, beside its tensors of the step."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    cos_sin: torch.Tensor
    """(positions, rope_dim) float32: cosines in the first half, sines in the second."""
    query_norm: RmsNorm | None = None
    """Over each head, before the rotation; so ``key_norm``."""
    key_norm: RmsNorm | None = None


def grouped_query_attention(
    qkv: torch.Tensor, shape: GroupedQueries, cache: tuple[torch.Tensor, ...], batch: AttentionBatch
) -> torch.Tensor:
    """All between the two linear layers of attention: norm, rope, cache write, attention.

    ``qkv`` is (T, (heads + 2 kv_heads) * head_dim), queries, keys and values side by side; it may be overwritten.
    Returns (T, heads * head_dim).
    """
    if batch.decode_rows == batch.context_lengths.shape[0]:
        triton = backends.triton_for(qkv, *cache)
        if triton is not None and triton.fits_grouped(qkv, *cache[:2]):
            return triton.attend_decodes(qkv, shape, cache, batch)
    queries = _write_keys_values(qkv, shape, cache, batch)
    return paged_attention(queries, cache, batch, shape.scale).view(qkv.shape[0], -1)


def last_query_attention(
    qkv: torch.Tensor,
    shape: GroupedQueries,
    cache: tuple[torch.Tensor, ...],
    batch: AttentionBatch,
    last: torch.Tensor,
    rows: AttentionBatch,
) -> torch.Tensor:
    """The same where only the queries of the (S,) flat tokens ``last`` are wanted: (S, heads * head_dim).

    ``rows`` is a step of S rows that have one of them each. All keys and values are written.
    """
    queries = _write_keys_values(qkv, shape, cache, batch).index_select(0, last)
    return paged_attention(queries, cache, rows, shape.scale).view(last.shape[0], -1)


def _write_keys_values(
    qkv: torch.Tensor, shape: GroupedQueries, cache: tuple[torch.Tensor, ...], batch: AttentionBatch
) -> torch.Tensor:
    """Norm, rope and cache write; returns the (T, heads, head_dim) queries."""
    heads, kv_heads = shape.heads, shape.kv_heads
    split = qkv.view(-1, heads + 2 * kv_heads, shape.head_dim)
    queries, keys, values = split.split_with_sizes((heads, kv_heads, kv_heads), dim=1)
    if shape.query_norm is not None and shape.key_norm is not None:
        queries, keys = shape.query_norm(queries), shape.key_norm(keys)
    rope_write_kv(
        queries,
        keys,
        values,
        batch.positions,
        shape.cos_sin,
        interleaved=False,
        cache=cache,
        cache_slots=batch.cache_slots,
    )
    return queries


def paged_attention(
    queries: torch.Tensor, cache: tuple[torch.Tensor, ...], batch: AttentionBatch, scale: float
) -> torch.Tensor:
    """Causal attention of (T, Hq, D) queries over a paged cache, this step's keys and values already written.

    The query at position p attends to positions 0 .. p of its row.
    """
    keys, values, *scales = cache
    triton = backends.triton_for(queries, *cache)
    if triton is not None and triton.fits_grouped(queries, keys, values):
        return triton.grouped_attention(queries, cache, batch, scale)
    if not scales:
        return _attention(queries, keys, values, batch, scale)
    group = queries.shape[1] // keys.shape[2]
    of_heads: torch.Tensor = scales[0].to(queries.dtype).repeat_interleave(group, 1).unsqueeze(-1)
    return _attention(queries * of_heads[0], keys, values, batch, scale) * of_heads[1]


def mla_attention(
    queries: torch.Tensor, cache: tuple[torch.Tensor, ...], batch: AttentionBatch, scale: float, value_width: int
) -> torch.Tensor:
    """Absorbed MLA: (T, H, C) queries over (blocks, block_size, C) latents -> (T, H, value_width).

    All heads share one key, the whole latent, and one value, its first ``value_width`` entries.
    """
    latents, *scales = cache
    keys = latents.unsqueeze(2)
    values = keys[..., :value_width]
    if not scales:
        return _attention(queries, keys, values, batch, scale)
    factors = scales[0].to(queries.dtype)
    return _attention(queries * factors, keys, values, batch, scale) * factors[:value_width]


def _attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: AttentionBatch, scale: float
) -> torch.Tensor:
    if backends.native is not None and backends.fits_native(queries) and keys.dtype in TYPE_CODES:
        return backends.native.attention(queries, keys, values, batch, scale)
    if queries.is_cpu:
        return reference.attention(queries, keys, values, batch, scale)
    triton = backends.triton_for(queries, keys, values)
    if triton is not None and triton.fits_attention(keys, values):
        return triton.attention(queries, keys, values, batch, scale)
    return reference.padded_attention(queries, keys, values, batch, scale)
