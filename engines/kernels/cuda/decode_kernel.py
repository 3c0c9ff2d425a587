"""The kernel of ``decode_attention``: all between the two linear layers of attention, for rows with one new token."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from engines.kernels.cuda.decode_splits import store_row, used_splits
from engines.kernels.cuda.decode_start import start_fused
from engines.kernels.cuda.fp8 import as_float16, head_scales, row_sizes


@triton.jit
def _read_row(context_lengths, query_starts, row, FUSED: tl.constexpr):
    """The row's token in the step, its cached tokens, and whether this kernel attends for it."""
    context = tl.load(context_lengths + row)
    if FUSED:
        token, cached, busy = row, context - 1, context > 0
    else:
        token, cached = tl.load(query_starts + row), context
        busy = (context > 0) & (tl.load(query_starts + row + 1) - token == 1)
    return token, cached, busy


@triton.jit
def _block_ids(table, place, capacity, BLOCK_SIZE: tl.constexpr):
    """Of each place, whether or not the row is as long: the table is."""
    return tl.load(table + place // BLOCK_SIZE, mask=place < capacity, other=0)


@triton.jit
def _load_tile(keys, values, ids, place, present, slot_stride, DIM, DIM_BLOCK, BLOCK_SIZE):
    """Keys and values of (TILE_N,) places; what lies behind a row's end may be anything, NaN too: it is not loaded."""
    dims = tl.arange(0, DIM_BLOCK)
    entry = (ids.to(tl.int64) * BLOCK_SIZE + place % BLOCK_SIZE) * slot_stride
    mask = present[:, None] & (dims < DIM)[None, :]
    offsets = entry[:, None] + dims[None, :]
    return tl.load(keys + offsets, mask=mask, other=0.0), tl.load(values + offsets, mask=mask, other=0.0)


@triton.jit
def _attend_tile(q, k, v, present, scale, best, total, sums):
    """One more tile of keys in the running softmax."""
    scores = tl.dot(q, tl.trans(k.to(q.dtype)))
    scores = tl.where(present[None, :], scores * scale, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(best - higher)
    total = total * shrink + tl.sum(weights, 1)
    sums = tl.dot(weights.to(q.dtype), v.to(q.dtype), sums * shrink[:, None])
    return higher, total, sums


@triton.jit
def _attend_staged(
    q,
    keys,
    values,
    table,
    first,
    cached,
    step,
    slot_stride,
    scale,
    best,
    total,
    sums,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_N: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
):
    """The program's tiles, which wait in shared memory: those of an fp8 cache would take a register for each byte.

    With SCALED q and the weights become float16.
    """
    if SCALED:
        sizes = row_sizes(q)
        q, scale = as_float16(q, sizes), (scale * sizes)[:, None]
    for begin in tl.range(first, cached, step, num_stages=STAGES):
        place = begin + tl.arange(0, TILE_N)
        present = place < cached
        ids = tl.load(table + place // BLOCK_SIZE, mask=present, other=0)
        k, v = _load_tile(keys, values, ids, place, present, slot_stride, DIM, DIM_BLOCK, BLOCK_SIZE)
        best, total, sums = _attend_tile(q, k, v, present, scale, best, total, sums)
    return best, total, sums


@triton.jit(do_not_specialize=["splits", "table_stride", "capacity"])
def decode_kernel(
    queries,
    keys,
    values,
    output,
    partials,
    partial_logs,
    arrivals,
    query_starts,
    context_lengths,
    cache_slots,
    block_tables,
    table_rows,
    cos_sin,
    query_gain,
    key_gain,
    scales,
    token_stride,
    head_stride,
    slot_stride,
    cache_head_stride,
    splits,
    table_stride,
    capacity,
    scale,
    eps,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    COMBINED: tl.constexpr,
    FUSED: tl.constexpr,
    NORM: tl.constexpr,
    SPLIT: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    EARLY: tl.constexpr,
    SCALED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (splits, kv heads, rows).

    With FUSED every row has one token, row r the r-th, and ``queries`` holds raw queries, keys and values side by side;
    else rows of any other count are left out and queries are ready, this step's keys and values in the cache.
    With EARLY, lengths and tables are read before the former kernel ends: a kernel launched without stands between.
    Without FUSED nothing of what the former kernel writes is read: it is waited for at the end only.
    With SCALED keys and values are fp8, and ``scales`` has one for each key head, then one for each value head.
    STAGES: tiles on their way at once through shared memory; 0: the next one, through registers.
    """
    if EARLY:
        tl_cuda.gdc_launch_dependents()
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line = row
    if TABLE_ROWS:
        line = tl.load(table_rows + row)
    table = block_tables + line.to(tl.int64) * table_stride
    lane = tl.arange(0, TILE_N)
    first = split * TILE_N
    # Asked for before the row's length is known: that saves a round trip to memory.
    ids = _block_ids(table, first + lane, capacity, BLOCK_SIZE)
    token, cached, busy = _read_row(context_lengths, query_starts, row, FUSED)
    used = used_splits(cached, splits, TILE_N, COMBINED)
    step = used * TILE_N
    next_ids = _block_ids(table, first + step + lane, capacity, BLOCK_SIZE)
    if (split >= used) | (busy == 0):
        if EARLY:
            tl_cuda.gdc_wait()
        return
    keys += kv_head * cache_head_stride
    values += kv_head * cache_head_stride
    place = first + lane
    k, v = _load_tile(keys, values, ids, place, place < cached, slot_stride, DIM, DIM_BLOCK, BLOCK_SIZE)
    key_scale, value_scale = head_scales(scales, kv_head, KV_HEADS, SCALED)
    scale *= key_scale
    if EARLY and FUSED:
        tl_cuda.gdc_wait()

    head, dims = tl.arange(0, TILE_M), tl.arange(0, DIM_BLOCK)
    mask = (head < GROUP)[:, None] & (dims < DIM)[None, :]
    source = queries + token.to(tl.int64) * token_stride
    own = source + kv_head * GROUP * head_stride
    if FUSED:
        q, best, total, sums = start_fused(
            own,
            source + (KV_HEADS * GROUP + kv_head) * head_stride,
            keys,
            values,
            cache_slots + row,
            cos_sin,
            query_gain,
            key_gain,
            cached,
            head_stride,
            slot_stride,
            scale,
            key_scale,
            value_scale,
            eps,
            split == 0,
            GROUP,
            KV_HEADS,
            DIM,
            HALF,
            TILE_M,
            DIM_BLOCK,
            NORM,
            SCALED,
        )
    else:
        q = tl.load(own + head[:, None] * head_stride + dims[None, :], mask=mask, other=0.0)
        best = tl.full((TILE_M,), float("-inf"), tl.float32)
        total = tl.zeros((TILE_M,), tl.float32)
        sums = tl.zeros((TILE_M, DIM_BLOCK), tl.float32)

    if STAGES > 0:
        best, total, sums = _attend_staged(
            q,
            keys,
            values,
            table,
            first,
            cached,
            step,
            slot_stride,
            scale,
            best,
            total,
            sums,
            DIM,
            DIM_BLOCK,
            BLOCK_SIZE,
            TILE_N,
            STAGES,
            SCALED,
        )
    else:
        for begin in range(first, cached, step):
            place = begin + lane
            ahead = place + step
            k_next, v_next = _load_tile(
                keys, values, next_ids, ahead, ahead < cached, slot_stride, DIM, DIM_BLOCK, BLOCK_SIZE
            )
            next_ids = _block_ids(table, ahead + step, capacity, BLOCK_SIZE)
            best, total, sums = _attend_tile(q, k, v, place < cached, scale, best, total, sums)
            k, v = k_next, v_next

    target = output + (token.to(tl.int64) * KV_HEADS + kv_head) * GROUP * DIM
    pair = row * KV_HEADS + kv_head
    parts, logs = partials + pair * splits * GROUP * DIM, partial_logs + pair * splits * GROUP
    store_row(
        sums / total[:, None] * value_scale,
        best + tl.log2(total),
        target,
        parts,
        logs,
        arrivals + pair,
        split,
        used,
        GROUP,
        DIM,
        TILE_M,
        GROUP_BLOCK,
        DIM_BLOCK,
        COMBINED,
        SPLIT,
    )
    if EARLY and not FUSED:
        tl_cuda.gdc_wait()
