"""The kernels that attend and expand in decodes of latent attention; ``mla`` launches them."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from engines.kernels.cuda.fp8 import as_float16, power_below


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
    scales,
    splits,
    table_stride,
    scale,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_N: tl.constexpr,
    INDIRECT: tl.constexpr,
    WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Grid (splits, rows, tiles of heads). Rows that have not exactly one query are left out.

    WHOLE: there is one split, whose result, (rows, heads, rank) in the queries' type, goes to ``partials``.
    With EARLY, lengths and tables are read before the former kernel ends: a kernel launched without stands between.
    With SCALED the cache is fp8: its scales go to the queries and to the sums, which loses no bit.
    """
    if EARLY:
        tl_cuda.gdc_launch_dependents()
    split, row = tl.program_id(0), tl.program_id(1)
    context = tl.load(context_lengths + row)
    start = tl.load(query_starts + row)
    count = tl.load(query_starts + row + 1) - start
    line = row.to(tl.int64)
    if INDIRECT:
        line = tl.load(table_rows + row).to(tl.int64)
    if EARLY:
        tl_cuda.gdc_wait()
    size = _split_size(context, splits, TILE_N)
    begin = split * size
    end = tl.minimum(begin + size, context)
    if (begin >= end) | (count != 1):
        return
    head = tl.program_id(2) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    is_head = (head < HEADS)[:, None]
    dims, rest = tl.arange(0, RANK_BLOCK), RANK + tl.arange(0, ROPE_BLOCK)
    is_dim, is_rest = (dims < RANK)[None, :], (rest < RANK + ROPE)[None, :]
    query = queries + (start.to(tl.int64) * HEADS + head[:, None]) * (RANK + ROPE)
    q = tl.load(query + dims[None, :], mask=is_head & is_dim, other=0.0)
    q_rest = tl.load(query + rest[None, :], mask=is_head & is_rest, other=0.0)
    latent_scale = 1.0
    if SCALED:
        latent_scale = tl.load(scales)
        wide, wide_rest = q.to(tl.float32) * latent_scale, q_rest.to(tl.float32) * tl.load(scales + RANK)
        sizes = power_below(tl.maximum(tl.max(tl.abs(wide), 1), tl.max(tl.abs(wide_rest), 1)))
        q, q_rest = as_float16(wide, sizes), as_float16(wide_rest, sizes)
        scale = (scale * sizes)[None, :]
    table = block_tables + line * table_stride

    best = tl.full((HEADS_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS_BLOCK,), tl.float32)
    sums = tl.zeros((RANK_BLOCK, HEADS_BLOCK), tl.float32)
    lane = tl.arange(0, TILE_N)
    # One tile ahead: the loads of a tile would wait for its block ids, and what follows for both.
    next_block = tl.load(table + (begin + lane) // BLOCK_SIZE, mask=begin + lane < end, other=0)
    for first in tl.range(begin, end, TILE_N):
        place = first + lane
        present = (place < end)[:, None]
        block = next_block.to(tl.int64)
        next_block = tl.load(table + (place + TILE_N) // BLOCK_SIZE, mask=place + TILE_N < end, other=0)
        # What lies behind a row's end may be anything, NaN too: it is never loaded.
        key = cache + (block * BLOCK_SIZE + place % BLOCK_SIZE)[:, None] * (RANK + ROPE)
        k = tl.load(key + dims[None, :], mask=present & is_dim, other=0.0).to(q.dtype)
        k_rest = tl.load(key + rest[None, :], mask=present & is_rest, other=0.0).to(q.dtype)
        # Keys stand on the left, so that wide matrix instructions read them from shared memory, both times.
        scores = tl.dot(k, tl.trans(q))
        scores = tl.dot(k_rest, tl.trans(q_rest), scores)
        scores = tl.where(present, scores * scale, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 0))
        weights = tl.exp2(scores - higher[None, :])
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(weights, 0)
        sums = tl.dot(tl.trans(k), weights.to(q.dtype), sums * shrink[None, :])
        best = higher

    entry = (row.to(tl.int64) * splits + split) * HEADS + head
    mask = is_head & is_dim
    result = sums / total[None, :]
    if SCALED:
        result *= latent_scale
    target = partials + entry[:, None] * RANK + dims[None, :]
    tl.store(target, tl.trans(result).to(partials.dtype.element_ty), mask=mask)
    if not WHOLE:
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
    context = tl.load(context_lengths + row)
    start = tl.load(query_starts + row)
    count = tl.load(query_starts + row + 1) - start
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    if (context == 0) | (count != 1):
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


@triton.jit(do_not_specialize=["splits", "rows"])
def expand_kernel(
    partials,
    partial_logs,
    up,
    context_lengths,
    query_starts,
    output,
    splits,
    rows,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    TILE_V: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_R: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (parts of the value, heads, tiles of rows)."""
    row, head = tl.program_id(2) * TILE_R + tl.arange(0, TILE_R), tl.program_id(1)
    column = tl.program_id(0) * TILE_V + tl.arange(0, TILE_V)
    dims = tl.arange(0, RANK_BLOCK)
    is_dim = (dims < RANK)[None, :]
    weights = up + (head * (NOPE + VALUE) + NOPE + column[None, :]) * RANK + dims[:, None]
    weight = tl.load(weights, mask=(column < VALUE)[None, :] & (dims < RANK)[:, None], other=0.0)
    present = row < rows
    context = tl.load(context_lengths + row, mask=present, other=0)
    start = tl.load(query_starts + row, mask=present, other=0)
    alone = tl.load(query_starts + row + 1, mask=present, other=0) - start == 1
    context = tl.where(alone, context, 0)
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    used = tl.where(context > 0, tl.cdiv(context, tl.maximum(_split_size(context, splits, TILE_N), 1)), 0)
    split = tl.arange(0, SPLITS_BLOCK)
    entry = (row.to(tl.int64) * splits)[:, None] + split[None, :]
    logs = tl.load(partial_logs + entry * HEADS + head, mask=split[None, :] < used[:, None], other=float("-inf"))
    best = tl.max(logs, 1)
    share = tl.exp2(logs - tl.where(used > 0, best, 0.0)[:, None])
    share = share / tl.maximum(tl.sum(share, 1), 1e-30)[:, None]
    joined = tl.zeros((TILE_R, RANK_BLOCK), tl.float32)
    for other in tl.range(0, tl.max(used, 0), num_stages=STAGES):
        parts = partials + ((row.to(tl.int64) * splits + other)[:, None] * HEADS + head) * RANK + dims[None, :]
        found = tl.load(parts, mask=(other < used)[:, None] & is_dim, other=0.0)
        joined += found * tl.sum(tl.where(split[None, :] == other, share, 0.0), 1)[:, None]
    result = tl.dot(joined.to(weight.dtype), weight, input_precision="ieee")
    target = output + (start.to(tl.int64)[:, None] * HEADS + head) * VALUE + column[None, :]
    mask = (used > 0)[:, None] & (column < VALUE)[None, :]
    tl.store(target, result.to(output.dtype.element_ty), mask=mask)
