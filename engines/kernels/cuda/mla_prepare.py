"""The kernel that brings latents into the cache and decodes' queries into the latent space; ``mla`` launches it."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from engines.kernels.cuda.fp8 import to_cache


@triton.jit
def _turn(
    source,
    target,
    cos,
    sin,
    mask,
    scales,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Turn the pairs of each row at ``source`` into ``target``; both are (rows, 1) pointers to a row's start."""
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    place = 2 * pair if INTERLEAVED else pair
    distance: tl.constexpr = 1 if INTERLEAVED else HALF
    kind = source.dtype.element_ty
    # Neighbours move as one number: one by one each would be written as half of a sector of the memory, twice.
    together: tl.constexpr = INTERLEAVED and not SCALED and source.dtype.element_ty.primitive_bitwidth == 16
    if together:
        pairs = tl.load(source.to(tl.pointer_type(tl.uint32), bitcast=True) + pair, mask=mask, other=0)
        left = pairs.to(tl.uint16).to(kind, bitcast=True).to(tl.float32)
        right = (pairs >> 16).to(tl.uint16).to(kind, bitcast=True).to(tl.float32)
    else:
        left = tl.load(source + place, mask=mask, other=0.0).to(tl.float32)
        right = tl.load(source + place + distance, mask=mask, other=0.0).to(tl.float32)
    # Rounded as the queries' and latents' own type first: the cache may have another one.
    first, second = (left * cos - right * sin).to(kind), (right * cos + left * sin).to(kind)
    if together:
        low, high = first.to(tl.uint16, bitcast=True), second.to(tl.uint16, bitcast=True)
        turned = low.to(tl.uint32) | high.to(tl.uint32) << 16
        tl.store(target.to(tl.pointer_type(tl.uint32), bitcast=True) + pair, turned, mask=mask)
    else:
        # All columns of the rope part have one.
        scale = 1.0
        if SCALED:
            scale = tl.load(scales)
        tl.store(target + place, to_cache(first, target, scale, SCALED), mask=mask)
        tl.store(target + place + distance, to_cache(second, target, scale, SCALED), mask=mask)


@triton.jit(do_not_specialize=["tokens", "decodes"])
def prepare_kernel(
    queries,
    latents,
    up,
    gain,
    positions,
    cos_sin,
    cache_slots,
    cache,
    scales,
    absorbed,
    query_stride,
    latent_stride,
    tokens,
    decodes,
    eps,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    NOPE: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    VALUE: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_C: tl.constexpr,
    EARLY: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Grid (tokens + heads * parts of the rank * tiles of decodes,): a latent, or a tile of one head's queries.

    With EARLY, slots and positions are read before the former kernel ends: a kernel launched without stands between.
    Only the first ``decodes`` tokens are absorbed; the queries of the others are turned in place. With SCALED the
    cache is fp8, and each of its columns has a scale.
    """
    pair = tl.arange(0, HALF_BLOCK)
    is_pair = pair < HALF
    if tl.program_id(0) < tokens:
        if EARLY:
            tl_cuda.gdc_launch_dependents()
        token = tl.program_id(0).to(tl.int64)
        slot = tl.load(cache_slots + token)
        angles = cos_sin + tl.load(positions + token) * (2 * HALF) + pair
        cos = tl.load(angles, mask=is_pair, other=0.0)[None, :]
        sin = tl.load(angles + HALF, mask=is_pair, other=0.0)[None, :]
        if EARLY:
            tl_cuda.gdc_wait()
        if slot < 0:
            return
        dims = tl.arange(0, RANK_BLOCK)
        source = latents + token * latent_stride
        target = cache + slot * (RANK + 2 * HALF)
        x = tl.load(source + dims, mask=dims < RANK, other=0.0).to(tl.float32)
        factor = tl.load(gain + dims, mask=dims < RANK, other=0.0).to(tl.float32)
        normed = (x * tl.rsqrt(tl.sum(x * x, 0) / RANK + eps) * factor).to(latents.dtype.element_ty)
        scale = 1.0
        if SCALED:
            scale = tl.load(scales)
        tl.store(target + dims, to_cache(normed, cache, scale, SCALED), mask=dims < RANK)
        row = tl.zeros((1, 1), tl.int64)
        rope_source, rope_target = source + RANK + row, target + RANK + row
        _turn(
            rope_source, rope_target, cos, sin, is_pair[None, :], scales + RANK, INTERLEAVED, HALF, HALF_BLOCK, SCALED
        )
        if token >= decodes:
            head = tl.arange(0, HEADS_BLOCK)[:, None]
            own = queries + token * query_stride + head * (NOPE + 2 * HALF) + NOPE
            mask = (head < HEADS) & is_pair[None, :]
            _turn(own, own, cos, sin, mask, scales, INTERLEAVED, HALF, HALF_BLOCK, False)
        return
    parts: tl.constexpr = (RANK + TILE_C - 1) // TILE_C
    item = tl.program_id(0) - tokens
    part, head, tile = item % parts, item // parts % HEADS, item // (parts * HEADS)
    column = part * TILE_C + tl.arange(0, TILE_C)
    is_column = (column < RANK)[None, :]
    depth = tl.arange(0, NOPE_BLOCK)
    weights = up + head * ((NOPE + VALUE) * RANK) + depth[:, None] * RANK + column[None, :]
    weight = tl.load(weights, mask=(depth < NOPE)[:, None] & is_column, other=0.0)
    token = tile * TILE_T + tl.arange(0, TILE_T)
    present = (token < decodes)[:, None]
    turned = present & is_pair[None, :] & (part == 0)
    position = tl.load(positions + token, mask=(token < decodes) & (part == 0), other=0)
    angles = cos_sin + position[:, None] * (2 * HALF) + pair[None, :]
    cos, sin = tl.load(angles, mask=turned, other=0.0), tl.load(angles + HALF, mask=turned, other=0.0)
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    wide_token = token.to(tl.int64)[:, None]
    query = queries + wide_token * query_stride + head * (NOPE + 2 * HALF)
    q = tl.load(query + depth[None, :], mask=present & (depth < NOPE)[None, :], other=0.0)
    target = absorbed + (wide_token * HEADS + head) * (RANK + 2 * HALF)
    result = tl.dot(q, weight, input_precision="ieee")
    tl.store(target + column[None, :], result.to(absorbed.dtype.element_ty), mask=present & is_column)
    if part == 0:
        _turn(query + NOPE, target + RANK, cos, sin, turned, scales, INTERLEAVED, HALF, HALF_BLOCK, False)
