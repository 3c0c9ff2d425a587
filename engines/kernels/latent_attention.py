"""Multi-head latent attention (MLA): all between the linear layers, the fastest implementation that fits.

A decode uses the absorbed form: queries are brought into the latent space, where the cache already is, so that only
the compressed cache is read. Prompts use the expanded form on a GPU, which multiplies less; on the CPU one form for
all gives a token the same result wherever a prompt is cut into chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engines.kernels import backends
from engines.kernels.attention import mla_attention
from engines.kernels.elementwise import rms_norm, rope_, write_latent
from engines.kernels.linear import linear
from engines.kernels.packing import PackedLinear, pack_dense
from engines.kernels.reference import AttentionBatch

if TYPE_CHECKING:
    from engines.kernels.cuda import TritonKernels

MOST_EXPANDED = 32768
"""Tokens whose keys and values may be expanded at once, prompts and what is cached before them: what memory they take
grows with that. A step with more attends in the absorbed form."""


@dataclass(frozen=True, slots=True)
class LatentQueries:
    """What latent attention of one layer is a function of, beside its tensors of the step."""

    up: LatentUp
    latent_gain: torch.Tensor
    """(rank,) of the latents' norm."""
    latent_eps: float
    cos_sin: torch.Tensor
    """(positions, rope) float32: cosines in the first half, sines in the second."""
    interleaved: bool
    scale: float

    @property
    def rank(self) -> int:
        """Width of a latent without its rope part."""
        return self.latent_gain.shape[0]

    @property
    def rope(self) -> int:
        """Width of the part that carries the position."""
        return self.cos_sin.shape[1]


@dataclass(frozen=True, slots=True)
class LatentUp:
    """The weights from latents to keys and values of each head."""

    heads: int
    nope: int
    value: int
    stacked: torch.Tensor | None
    """On a GPU: (heads, nope + value, rank)."""
    keys: tuple[PackedLinear, ...]
    """On the CPU: from a head's query to the latent space; ``values`` from there to its value. A batched product would
    sum in an order that depends on T; the packed one never does."""
    values: tuple[PackedLinear, ...]


def pack_latent_up(weight: torch.Tensor, heads: int, nope: int) -> LatentUp:
    """(heads * (nope + value), rank): each head's key rows, then its value rows."""
    stacked = weight.view(heads, -1, weight.shape[1])
    value = stacked.shape[1] - nope
    if not weight.is_cpu:
        return LatentUp(heads, nope, value, stacked, (), ())
    keys = tuple(pack_dense(head[:nope].t().contiguous()) for head in stacked)
    return LatentUp(heads, nope, value, None, keys, tuple(pack_dense(head[nope:].contiguous()) for head in stacked))


def latent_attention(
    queries: torch.Tensor,
    latents: torch.Tensor,
    shape: LatentQueries,
    cache: tuple[torch.Tensor, ...],
    batch: AttentionBatch,
) -> torch.Tensor:
    """Norm and rope of the latents, rope of the queries, cache write, attention.

    ``queries`` is (T, heads * (nope + rope)), ``latents`` (T, rank + rope), both as their linear layers give them;
    both may be overwritten. The cache is (blocks, block_size, rank + rope), and in fp8 the scales of its columns, of
    which the latent's have one and the rope part's another. Returns (T, heads * value).
    """
    up = shape.up
    queries = queries.view(-1, up.heads, up.nope + shape.rope)
    triton = _triton(queries, latents, shape, cache)
    if triton is not None and batch.decode_rows is not None:
        scales = cache[1] if len(cache) > 1 else None
        if batch.decode_rows == batch.context_lengths.shape[0]:
            return triton.attend_latents(queries, latents, shape, cache[0], batch, scales)
        blocks = _prompt_blocks(batch, cache[0].shape[1])
        if blocks * cache[0].shape[1] <= MOST_EXPANDED and triton.fits_prompts(shape):
            decodes = batch.decode_rows
            return triton.attend_mixed_latents(queries, latents, shape, cache[0], batch, decodes, blocks, scales)
    return _composed(queries, latents, shape, cache, batch)


def last_latent_attention(
    queries: torch.Tensor,
    latents: torch.Tensor,
    shape: LatentQueries,
    cache: tuple[torch.Tensor, ...],
    batch: AttentionBatch,
    last: torch.Tensor,
    rows: AttentionBatch,
) -> torch.Tensor:
    """The same where only the queries of the (S,) flat tokens ``last`` are wanted: (S, heads * value).

    ``rows`` is a step of S rows that have one of them each. All latents are written.
    """
    own_queries, own_latents = queries.index_select(0, last), latents.index_select(0, last)
    queries = queries.view(-1, shape.up.heads, shape.up.nope + shape.rope)
    if (triton := _triton(queries, latents, shape, cache)) is not None:
        triton.write_latents(queries, latents, shape, cache[0], batch, cache[1] if len(cache) > 1 else None)
    else:
        _write(queries[..., shape.up.nope :], latents, shape, cache, batch)
    return latent_attention(own_queries, own_latents, shape, cache, rows)


def _triton(
    queries: torch.Tensor, latents: torch.Tensor, shape: LatentQueries, cache: tuple[torch.Tensor, ...]
) -> TritonKernels | None:
    """The kernels that take a layer of such tensors whole."""
    if shape.up.stacked is None or queries.dtype is not torch.bfloat16:
        return None
    triton = backends.triton_for(queries, latents, *cache)
    return triton if triton is not None and triton.fits_latents(shape) else None


def _prompt_blocks(batch: AttentionBatch, block_size: int) -> int:
    """At most so many cache blocks hold the rows of several tokens."""
    if batch.prompt_blocks is not None:
        return batch.prompt_blocks
    rows = batch.context_lengths.shape[0] - (batch.decode_rows or 0)
    return rows * -(-batch.longest_context // block_size)


def _composed(
    queries: torch.Tensor,
    latents: torch.Tensor,
    shape: LatentQueries,
    cache: tuple[torch.Tensor, ...],
    batch: AttentionBatch,
) -> torch.Tensor:
    tokens, rank, up = queries.shape[0], shape.rank, shape.up
    absorbed = queries.new_empty(tokens, up.heads, rank + shape.rope)
    _absorb(queries[..., : up.nope], up, absorbed[..., :rank])
    absorbed[..., rank:] = queries[..., up.nope :]
    _write(absorbed[..., rank:], latents, shape, cache, batch)
    attended = mla_attention(absorbed, cache, batch, shape.scale, rank)
    values = queries.new_empty(tokens, up.heads, up.value)
    _expand(attended, up, values)
    return values.view(tokens, up.heads * up.value)


def _write(
    query_rope: torch.Tensor,
    latents: torch.Tensor,
    shape: LatentQueries,
    cache: tuple[torch.Tensor, ...],
    batch: AttentionBatch,
) -> None:
    """Norm, rope and cache write of the latents, in place; the (T, heads, rope) ends of queries are turned too."""
    rank = shape.rank
    latents[:, :rank] = rms_norm(latents[:, :rank], shape.latent_gain, shape.latent_eps)
    rope_(query_rope, latents[:, rank:].unsqueeze(1), batch.positions, shape.cos_sin, shape.interleaved)
    write_latent(latents, cache, batch.cache_slots)


def _absorb(queries: torch.Tensor, up: LatentUp, output: torch.Tensor) -> None:
    """(T, heads, nope) into ``output``, (T, heads, rank)."""
    if up.stacked is not None:
        output.copy_(torch.bmm(queries.transpose(0, 1), up.stacked[:, : up.nope]).transpose(0, 1))
        return
    for head, packed in enumerate(up.keys):
        output[:, head] = linear(queries[:, head].contiguous(), packed)


def _expand(attended: torch.Tensor, up: LatentUp, output: torch.Tensor) -> None:
    """(T, heads, rank) into ``output``, (T, heads, value)."""
    if up.stacked is not None:
        values = up.stacked[:, up.nope :].transpose(1, 2)
        output.copy_(torch.bmm(attended.transpose(0, 1), values).transpose(0, 1))
        return
    for head, packed in enumerate(up.values):
        output[:, head] = linear(attended[:, head].contiguous(), packed)
