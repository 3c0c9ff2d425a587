"""The kernels of decodes of latent attention; ``mla`` launches them."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda


@triton.jit
def _turn(source, target, cos, sin, mask, INTERLEAVED: tl.constexpr, HALF: tl.constexpr):
    """Turn the pairs of each row at ``source`` into ``target``; both are (rows, 1) pointers to a row's start."""
    # Rounded as the queries' and latents' own type first: the cache may have another one.
    kind = source.dtype.element_ty
    if INTERLEAVED:
        place = tl.arange(0, 2 * HALF)[None, :]
        both = tl.load(source + place, mask=mask, other=0.0).to(tl.float32)
        left, right = tl.split(tl.reshape(both, (both.shape[0], HALF, 2)))
        turned = tl.join(left * cos - right * sin, right * cos + left * sin)
        turned = tl.reshape(turned, (both.shape[0], 2 * HALF)).to(kind)
        tl.store(target + place, turned.to(target.dtype.element_ty), mask=mask)
    else:
        place = tl.arange(0, HALF)[None, :]
        left = tl.load(source + place, mask=mask, other=0.0).to(tl.float32)
        right = tl.load(source + place + HALF, mask=mask, other=0.0).to(tl.float32)
        first, second = (left * cos - right * sin).to(kind), (right * cos + left * sin).to(kind)
        tl.store(target + place, first.to(target.dtype.element_ty), mask=mask)
        tl.store(target + place + HALF, second.to(target.dtype.element_ty), mask=mask)


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
    INTERLEAVED: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_C: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (tokens + heads * parts of the rank * tiles of decodes,): a latent, or a tile of one head's queries.

    Only the first ``decodes`` tokens are absorbed; the queries of the others are turned in place.
    """
    pair = tl.arange(0, HALF)
    if tl.program_id(0) < tokens:
        if EARLY:
            tl_cuda.gdc_launch_dependents()
            tl_cuda.gdc_wait()
        token = tl.program_id(0).to(tl.int64)
        slot = tl.load(cache_slots + token)
        if slot < 0:
            return
        dims = tl.arange(0, RANK_BLOCK)
        source = latents + token * latent_stride
        target = cache + slot * (RANK + 2 * HALF)
        x = tl.load(source + dims, mask=dims < RANK, other=0.0).to(tl.float32)
        factor = tl.load(gain + dims, mask=dims < RANK, other=0.0).to(tl.float32)
        normed = (x * tl.rsqrt(tl.sum(x * x, 0) / RANK + eps) * factor).to(latents.dtype.element_ty)
        tl.store(target + dims, normed.to(cache.dtype.element_ty), mask=dims < RANK)
        angles = cos_sin + tl.load(positions + token) * (2 * HALF) + pair
        cos = tl.load(angles)[None, :]
        sin = tl.load(angles + HALF)[None, :]
        row = tl.zeros((1, 1), tl.int64)
        _turn(source + RANK + row, target + RANK + row, cos, sin, row == 0, INTERLEAVED, HALF)
        if token >= decodes:
            head = tl.arange(0, HEADS_BLOCK)[:, None]
            own = queries + token * query_stride + head * (NOPE + 2 * HALF) + NOPE
            _turn(own, own, cos, sin, head < HEADS, INTERLEAVED, HALF)
        return
    parts: tl.constexpr = (RANK + TILE_C - 1) // TILE_C
    item = tl.program_id(0) - tokens
    part, head, tile = item % parts, item // parts % HEADS, item // (parts * HEADS)
    column = part * TILE_C + tl.arange(0, TILE_C)
    is_column = (column < RANK)[None, :]
    depth = tl.arange(0, NOPE_BLOCK)
    weights = up + head * ((NOPE + VALUE) * RANK) + depth[:, None] * RANK + column[None, :]
    weight = tl.load(weights, mask=(depth < NOPE)[:, None] & is_column, other=0.0)
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    token = tile * TILE_T + tl.arange(0, TILE_T)
    present = (token < decodes)[:, None]
    wide_token = token.to(tl.int64)[:, None]
    query = queries + wide_token * query_stride + head * (NOPE + 2 * HALF)
    q = tl.load(query + depth[None, :], mask=present & (depth < NOPE)[None, :], other=0.0)
    target = absorbed + (wide_token * HEADS + head) * (RANK + 2 * HALF)
    result = tl.dot(q, weight, input_precision="ieee")
    tl.store(target + column[None, :], result.to(absorbed.dtype.element_ty), mask=present & is_column)
    if part == 0:
        position = tl.load(positions + token, mask=token < decodes, other=0)
        angles = cos_sin + position[:, None] * (2 * HALF) + pair[None, :]
        cos, sin = tl.load(angles, mask=present, other=0.0), tl.load(angles + HALF, mask=present, other=0.0)
        _turn(query + NOPE, target + RANK, cos, sin, present, INTERLEAVED, HALF)


@triton.jit
def _split_size(context, splits, TILE: tl.constexpr):
    """Keys in each part of a row, whole tiles."""
    return tl.cdiv(tl.cdiv(context, splits), TILE) * TILE


@triton.jit(do_not_specialize=["splits", "table_stride"])
def attend_kernel(
    queries,
    cache,
    partials,
    partial_logs,
    query_starts,
    context_lengths,
    block_tables,
    table_rows,
    splits,
    table_stride,
    scale,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_N: tl.constexpr,
    INDIRECT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (splits, rows, tiles of heads). Rows that have not exactly one query are left out."""
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    split, row = tl.program_id(0), tl.program_id(1)
    context = tl.load(context_lengths + row)
    start = tl.load(query_starts + row)
    size = _split_size(context, splits, TILE_N)
    begin = split * size
    end = tl.minimum(begin + size, context)
    if (begin >= end) | (tl.load(query_starts + row + 1) - start != 1):
        return
    head = tl.program_id(2) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    is_head = (head < HEADS)[:, None]
    # The rank is cut into four, so that one thread's loads of a key lie at fixed distances.
    part: tl.constexpr = RANK // 4
    dims, rest = tl.arange(0, part)[None, :], RANK + tl.arange(0, ROPE)[None, :]
    query = queries + (start.to(tl.int64) * HEADS + head[:, None]) * (RANK + ROPE)
    q0 = tl.load(query + dims, mask=is_head, other=0.0)
    q1 = tl.load(query + part + dims, mask=is_head, other=0.0)
    q2 = tl.load(query + 2 * part + dims, mask=is_head, other=0.0)
    q3 = tl.load(query + 3 * part + dims, mask=is_head, other=0.0)
    q_rest = tl.load(query + rest, mask=is_head, other=0.0)
    line = row.to(tl.int64)
    if INDIRECT:
        line = tl.load(table_rows + row).to(tl.int64)
    table = block_tables + line * table_stride

    best = tl.full((HEADS_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS_BLOCK,), tl.float32)
    sums0 = tl.zeros((part, HEADS_BLOCK), tl.float32)
    sums1 = tl.zeros((part, HEADS_BLOCK), tl.float32)
    sums2 = tl.zeros((part, HEADS_BLOCK), tl.float32)
    sums3 = tl.zeros((part, HEADS_BLOCK), tl.float32)
    for first in tl.range(begin, end, TILE_N):
        place = first + tl.arange(0, TILE_N)
        present = (place < end)[:, None]
        block = tl.load(table + place // BLOCK_SIZE, mask=place < end, other=0).to(tl.int64)
        # What lies behind a row's end may be anything, NaN too: it is never loaded.
        key = cache + (block * BLOCK_SIZE + place % BLOCK_SIZE)[:, None] * (RANK + ROPE)
        k0 = tl.load(key + dims, mask=present, other=0.0).to(q0.dtype)
        k1 = tl.load(key + part + dims, mask=present, other=0.0).to(q0.dtype)
        k2 = tl.load(key + 2 * part + dims, mask=present, other=0.0).to(q0.dtype)
        k3 = tl.load(key + 3 * part + dims, mask=present, other=0.0).to(q0.dtype)
        k_rest = tl.load(key + rest, mask=present, other=0.0).to(q0.dtype)
        # Keys stand on the left, so that wide matrix instructions read them from shared memory, both times.
        scores = tl.dot(k_rest, tl.trans(q_rest))
        scores = tl.dot(k0, tl.trans(q0), scores)
        scores = tl.dot(k1, tl.trans(q1), scores)
        scores = tl.dot(k2, tl.trans(q2), scores)
        scores = tl.dot(k3, tl.trans(q3), scores)
        scores = tl.where(present, scores * scale, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 0))
        weights = tl.exp2(scores - higher[None, :])
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(weights, 0)
        narrow, factor = weights.to(q0.dtype), shrink[None, :]
        sums0 = tl.dot(tl.trans(k0), narrow, sums0 * factor)
        sums1 = tl.dot(tl.trans(k1), narrow, sums1 * factor)
        sums2 = tl.dot(tl.trans(k2), narrow, sums2 * factor)
        sums3 = tl.dot(tl.trans(k3), narrow, sums3 * factor)
        best = higher

    entry = (row.to(tl.int64) * splits + split) * HEADS + head
    target, share = partials + entry[:, None] * RANK + dims, 1.0 / total[None, :]
    tl.store(target, tl.trans(sums0 * share), mask=is_head)
    tl.store(target + part, tl.trans(sums1 * share), mask=is_head)
    tl.store(target + 2 * part, tl.trans(sums2 * share), mask=is_head)
    tl.store(target + 3 * part, tl.trans(sums3 * share), mask=is_head)
    tl.store(partial_logs + entry, best + tl.log2(total), mask=head < HEADS)


@triton.jit
def _weigh(partial_logs, row, splits, used, head, HEADS: tl.constexpr, SPLITS_BLOCK: tl.constexpr):
    """(SPLITS_BLOCK,) share of each part in the row's sums; 0 for those that are not used."""
    split = tl.arange(0, SPLITS_BLOCK)
    logs = tl.load(partial_logs + (row * splits + split) * HEADS + head, mask=split < used, other=float("-inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))
    return weights / tl.sum(weights, 0)


@triton.jit(do_not_specialize=["splits"])
def expand_one_kernel(
    partials,
    partial_logs,
    up,
    context_lengths,
    query_starts,
    output,
    splits,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    TILE_V: tl.constexpr,
    TILE_N: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (parts of the value, heads, rows): one row's parts joined and multiplied."""
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    column = tl.program_id(0) * TILE_V + tl.arange(0, TILE_V)
    dims = tl.arange(0, RANK_BLOCK)
    is_dim = (dims < RANK)[None, :]
    weights = up + (head * (NOPE + VALUE) + NOPE + column[:, None]) * RANK + dims[None, :]
    weight = tl.load(weights, mask=(column < VALUE)[:, None] & is_dim, other=0.0)
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    context = tl.load(context_lengths + row)
    start = tl.load(query_starts + row)
    if (context == 0) | (tl.load(query_starts + row + 1) - start != 1):
        return
    used = tl.cdiv(context, _split_size(context, splits, TILE_N))
    share = _weigh(partial_logs, row, splits, used, head, HEADS, SPLITS_BLOCK)
    split = tl.arange(0, SPLITS_BLOCK)
    parts = partials + ((row * splits + split)[:, None] * HEADS + head) * RANK + dims[None, :]
    found = tl.load(parts, mask=(split < used)[:, None] & is_dim, other=0.0)
    joined = tl.sum(found * share[:, None], 0).to(weight.dtype).to(tl.float32)
    result = tl.sum(weight.to(tl.float32) * joined[None, :], 1)
    target = output + (start.to(tl.int64) * HEADS + head) * VALUE + column
    tl.store(target, result.to(output.dtype.element_ty), mask=column < VALUE)


@triton.jit(do_not_specialize=["splits"])
def join_kernel(
    partials,
    partial_logs,
    context_lengths,
    query_starts,
    joined,
    splits,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    TILE_N: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (rows, heads): a row's parts become one, (rows, HEADS, RANK); zero where the row has not one query."""
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    context = tl.load(context_lengths + row)
    alone = tl.load(query_starts + row + 1) - tl.load(query_starts + row) == 1
    used = tl.where(alone, tl.cdiv(context, tl.maximum(_split_size(context, splits, TILE_N), 1)), 0)
    dims, split = tl.arange(0, RANK_BLOCK), tl.arange(0, SPLITS_BLOCK)
    logs = tl.load(partial_logs + (row * splits + split) * HEADS + head, mask=split < used, other=float("-inf"))
    share = tl.exp2(logs - tl.maximum(tl.max(logs, 0), -1e30))
    share = share / tl.maximum(tl.sum(share, 0), 1e-30)
    parts = partials + ((row * splits + split)[:, None] * HEADS + head) * RANK + dims[None, :]
    found = tl.load(parts, mask=(split < used)[:, None] & (dims < RANK)[None, :], other=0.0)
    result = tl.sum(found * share[:, None], 0)
    tl.store(joined + (row * HEADS + head) * RANK + dims, result.to(joined.dtype.element_ty), mask=dims < RANK)


@triton.jit(do_not_specialize=["rows"])
def expand_kernel(
    joined,
    up,
    query_starts,
    output,
    rows,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    RANK: tl.constexpr,
    TILE_V: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (parts of the value, heads, tiles of rows)."""
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    row, head = tl.program_id(2) * TILE_R + tl.arange(0, TILE_R), tl.program_id(1)
    column, depth = tl.program_id(0) * TILE_V + tl.arange(0, TILE_V), tl.arange(0, TILE_K)
    present, is_column = row < rows, column < VALUE
    weights = up + (head * (NOPE + VALUE) + NOPE + column[:, None]) * RANK + depth[None, :]
    source = joined + (row.to(tl.int64)[:, None] * HEADS + head) * RANK + depth[None, :]
    sums = tl.zeros((TILE_R, TILE_V), tl.float32)
    for k in tl.range(0, RANK, TILE_K, num_stages=4):
        weight = tl.load(weights + k, mask=is_column[:, None], other=0.0)
        sums = tl.dot(tl.load(source + k, mask=present[:, None], other=0.0), tl.trans(weight), sums)
    start = tl.load(query_starts + row, mask=present, other=0)
    alone = tl.load(query_starts + row + 1, mask=present, other=0) - start == 1
    target = output + (start.to(tl.int64)[:, None] * HEADS + head) * VALUE + column[None, :]
    tl.store(target, sums.to(output.dtype.element_ty), mask=alone[:, None] & is_column[None, :])
