"""The kernel of ``decode_attention``: all between the two linear layers of attention, for rows with one new token."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda


@triton.jit
def _partners(dims, DIM: tl.constexpr, HALF: tl.constexpr):
    """The other dim of each dim's rotated pair; behind the pairs the dim itself."""
    partner = (dims + HALF) % (2 * HALF)
    if DIM > 2 * HALF:
        partner = tl.where(dims < 2 * HALF, partner, dims)
    return partner


@triton.jit
def _angles(cos_sin, position, dims, HALF: tl.constexpr):
    """Cosine and signed sine of each dim, so that it becomes ``itself * cos + partner * sin``."""
    angle = cos_sin + position.to(tl.int64) * (2 * HALF) + dims % HALF
    cos = tl.load(angle, mask=dims < 2 * HALF, other=1.0)
    sin = tl.load(angle + HALF, mask=dims < 2 * HALF, other=0.0)
    return cos, tl.where(dims < HALF, -sin, sin)


@triton.jit
def _turned(x, partner, gain, gain_partner, cos, sin, eps, DIM: tl.constexpr, NORM: tl.constexpr):
    """(heads, dims) and their partners: normed over the dims if NORM, rotated; rounded as often as one by one."""
    left, right = x.to(tl.float32), partner.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(left * left, 1) / DIM + eps)[:, None]
        left = (left * scale * gain.to(tl.float32)).to(x.dtype).to(tl.float32)
        right = (right * scale * gain_partner.to(tl.float32)).to(x.dtype).to(tl.float32)
    return (left * cos + right * sin).to(x.dtype)


@triton.jit
def _load_gain(gain, dims, partner, DIM: tl.constexpr, NORM: tl.constexpr):
    """A norm's gain for dims and partners; with no norm, what is never used."""
    if NORM:
        own = tl.load(gain + dims, mask=dims < DIM, other=0.0)
        other = tl.load(gain + partner, mask=dims < DIM, other=0.0)
    else:
        own, other = dims, dims
    return own, other


@triton.jit
def _start_fused(
    queries,
    new,
    keys,
    values,
    cache_slot,
    cos_sin,
    query_gain,
    key_gain,
    position,
    head_stride,
    slot_stride,
    scale,
    eps,
    first,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    TILE_M: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):
    """Queries, and the running softmax over the row's new token where ``first``, else over none.

    The first split also writes the new key and value. All that comes from memory is asked for before any of it is
    used, and what is the same for all heads is loaded for each: so it lies where it is needed.
    """
    head = tl.arange(0, TILE_M)[:, None]
    dims = tl.broadcast_to(tl.arange(0, DIM_BLOCK)[None, :], (TILE_M, DIM_BLOCK))
    partner = _partners(dims, DIM, HALF)
    is_dim = dims < DIM
    mask, new_mask = (head < GROUP) & is_dim, is_dim & first
    own = queries + head * head_stride
    x = tl.load(own + dims, mask=mask, other=0.0)
    x_partner = tl.load(own + partner, mask=mask, other=0.0)
    key = tl.load(new + dims, mask=new_mask, other=0.0)
    key_partner = tl.load(new + partner, mask=new_mask, other=0.0)
    value = tl.load(new + KV_HEADS * head_stride + dims, mask=new_mask, other=0.0)
    slot = tl.load(cache_slot, mask=first, other=-1)
    cos, sin = _angles(cos_sin, position, dims, HALF)
    gain, gain_partner = _load_gain(query_gain, dims, partner, DIM, NORM)
    new_gain, new_gain_partner = _load_gain(key_gain, dims, partner, DIM, NORM)
    q = _turned(x, x_partner, gain, gain_partner, cos, sin, eps, DIM, NORM)
    best = tl.full((TILE_M,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_M,), tl.float32)
    sums = tl.zeros((TILE_M, DIM_BLOCK), tl.float32)
    if first:
        turned = _turned(key, key_partner, new_gain, new_gain_partner, cos, sin, eps, DIM, NORM)
        entry = slot * slot_stride + dims
        written = is_dim & (head == 0) & (slot >= 0)
        tl.store(keys + entry, turned.to(keys.dtype.element_ty), mask=written)
        tl.store(values + entry, value.to(values.dtype.element_ty), mask=written)
        best = tl.sum(q.to(tl.float32) * turned.to(tl.float32), 1) * scale
        total += 1.0
        sums += value.to(tl.float32)
    return q, best, total, sums


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
def _used_splits(cached, splits, TILE_N: tl.constexpr, COMBINED: tl.constexpr):
    """Programs that share a row: one a tile while all fit in one round of combining, then one for two tiles."""
    tiles = tl.maximum(1, tl.cdiv(cached, TILE_N))
    return tl.minimum(splits, tl.maximum(tl.minimum(tiles, COMBINED), tl.cdiv(tiles, 2)))


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
def _store_combined(parts, logs, used, target, GROUP, GROUP_BLOCK, DIM, DIM_BLOCK, COMBINED: tl.constexpr):
    """The sums of a row's splits, weighted by their logarithms, in the order of the splits: (heads, dims).

    The loads pass by the first cache, which knows nothing of other processors' stores.
    """
    head, dims = tl.arange(0, GROUP_BLOCK), tl.arange(0, DIM_BLOCK)
    is_head = (head < GROUP)[:, None]
    best = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    sums = tl.zeros((GROUP_BLOCK, DIM_BLOCK), tl.float32)
    for first in range(0, used, COMBINED):
        split = first + tl.arange(0, COMBINED)
        # Heads before splits: a head's splits then lie in one thread, which needs no other to add them.
        entry = split[None, :] * GROUP + head[:, None]
        mask = (split < used)[None, :] & is_head
        log = tl.load(logs + entry, mask=mask, other=float("-inf"), cache_modifier=".cg")
        whole = mask[:, :, None] & (dims < DIM)[None, None, :]
        place = entry[:, :, None] * DIM + dims[None, None, :]
        part = tl.load(parts + place, mask=whole, other=0.0, cache_modifier=".cg")
        log = tl.where(is_head, log, 0.0)
        higher = tl.maximum(best, tl.max(log, 1))
        weights = tl.exp2(log - higher[:, None])
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.sum(part * weights[:, :, None], 1)
        best = higher
    mask = is_head & (dims < DIM)[None, :]
    result = (sums / total[:, None]).to(target.dtype.element_ty)
    tl.store(target + head[:, None] * DIM + dims[None, :], result, mask=mask)


@triton.jit
def _store_row(
    result,
    log,
    target,
    parts,
    logs,
    arrivals,
    split,
    used,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    TILE_M: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    COMBINED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The whole result of a row that one program had to itself; else this split's, and the row's if it is the last."""
    head, dims = tl.arange(0, TILE_M), tl.arange(0, DIM_BLOCK)
    mask = (head < GROUP)[:, None] & (dims < DIM)[None, :]
    place = head[:, None] * DIM + dims[None, :]
    if (not SPLIT) or used == 1:
        tl.store(target + place, result.to(target.dtype.element_ty), mask=mask)
    else:
        tl.store(parts + split * GROUP * DIM + place, result, mask=mask)
        tl.store(logs + split * GROUP + head, log, mask=head < GROUP)
        # All threads' stores come before the one thread's count, which releases them.
        tl.debug_barrier()
        if tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == used - 1:
            _store_combined(parts, logs, used, target, GROUP, GROUP_BLOCK, DIM, DIM_BLOCK, COMBINED)
            tl.store(arrivals, 0)


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
):
    """Grid (splits, kv heads, rows).

    With FUSED every row has one token, row r the r-th, and ``queries`` holds raw queries, keys and values side by side;
    else rows of any other count are left out and queries are ready, this step's keys and values in the cache.
    With EARLY, lengths and tables are read before the former kernel ends: a kernel launched without stands between.
    Without FUSED nothing of what the former kernel writes is read: it is waited for at the end only.
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
    used = _used_splits(cached, splits, TILE_N, COMBINED)
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
    if EARLY and FUSED:
        tl_cuda.gdc_wait()

    head, dims = tl.arange(0, TILE_M), tl.arange(0, DIM_BLOCK)
    mask = (head < GROUP)[:, None] & (dims < DIM)[None, :]
    source = queries + token.to(tl.int64) * token_stride
    own = source + kv_head * GROUP * head_stride
    if FUSED:
        q, best, total, sums = _start_fused(
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
            eps,
            split == 0,
            GROUP,
            KV_HEADS,
            DIM,
            HALF,
            TILE_M,
            DIM_BLOCK,
            NORM,
        )
    else:
        q = tl.load(own + head[:, None] * head_stride + dims[None, :], mask=mask, other=0.0)
        best = tl.full((TILE_M,), float("-inf"), tl.float32)
        total = tl.zeros((TILE_M,), tl.float32)
        sums = tl.zeros((TILE_M, DIM_BLOCK), tl.float32)

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
    _store_row(
        sums / total[:, None],
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
