"""The kernel of ``decode_attention`` on Hopper: cached keys and values on their way before the queries are there.

A program owns one row, one key/value head and every ``used``-th tile of 64 cached keys. It starts while the linear
layer before it still runs, and asks the tensor memory accelerator for its first ``STAGES`` tiles at once: they are of
earlier steps and lie in shared memory when the queries arrive. Each of the four warps multiplies its own 16 keys, one
block of the cache, with a running maximum of its own; they meet once, at the end. The split that finishes last puts the
row together, as in ``decode_splits``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, mma_v2, tma

from engines.kernels.cuda.attention import LOG2_E
from engines.kernels.cuda.device import processors, starts_early
from engines.kernels.cuda.hopper_attention import HALF, KEYS, WIDTH, _let_start
from engines.kernels.cuda.launch import Launcher, Tiled
from engines.kernels.cuda.scratch import counters
from engines.kernels.reference import AttentionBatch

if TYPE_CHECKING:
    from engines.kernels.attention import GroupedQueries

BLOCK = 16
"""Tokens of a block of the cache."""
STAGES = 3
"""Tiles of keys and values in shared memory, 32 KiB each: so two programs fit on a processor."""
PROGRAMS = 2
"""For each processor."""
MOST_SPLITS = 16
WARPS = 4
MOST_GROUP = 16


@gluon.jit
def _wait_before():
    """For the kernel before this one in the stream, and all before that."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _block_ids(table, tile, last_block):
    """Of a tile's four blocks; those behind the row's last repeat it."""
    first = table + gl.minimum(tile * 4, last_block)
    second = table + gl.minimum(tile * 4 + 1, last_block)
    third = table + gl.minimum(tile * 4 + 2, last_block)
    return gl.load(first), gl.load(second), gl.load(third), gl.load(table + gl.minimum(tile * 4 + 3, last_block))


@gluon.jit
def _fetch_block(keys, values, key_blocks, value_blocks, barrier, place, identity, column, wanted):
    for half in gl.static_range(2):
        where = column + half * 64
        at = place + half * 4
        tma.async_copy_global_to_shared(keys, [identity * 16, where], barrier, key_blocks.index(at), pred=wanted)
        tma.async_copy_global_to_shared(values, [identity * 16, where], barrier, value_blocks.index(at), pred=wanted)


@gluon.jit
def _fetch(keys, values, key_blocks, value_blocks, full, slot, a, b, c, d, column, wanted):
    """Begin to load a tile of keys and of values."""
    barrier = full.index(slot)
    mbarrier.expect(barrier, 2 * 64 * 256, pred=wanted)
    _fetch_block(keys, values, key_blocks, value_blocks, barrier, slot * 8, a, column, wanted)
    _fetch_block(keys, values, key_blocks, value_blocks, barrier, slot * 8 + 1, b, column, wanted)
    _fetch_block(keys, values, key_blocks, value_blocks, barrier, slot * 8 + 2, c, column, wanted)
    _fetch_block(keys, values, key_blocks, value_blocks, barrier, slot * 8 + 3, d, column, wanted)


@gluon.jit
def _turn(left, right, left_gain, right_gain, cos, sin, squares, eps, NORM: gl.constexpr, dtype: gl.constexpr):
    """Both halves normed if NORM, then rotated; rounded as often as one by one."""
    if NORM:
        scale = gl.rsqrt(squares / 128 + eps)
        left = (left * scale * left_gain).to(dtype).to(gl.float32)
        right = (right * scale * right_gain).to(dtype).to(gl.float32)
    return (left * cos - right * sin).to(dtype), (right * cos + left * sin).to(dtype)


@gluon.jit
def _attend_tile(q_left, q_right, k_tiles, v_tiles, slot, known, scale, best, total, left, right, mma: gl.constexpr):
    """One more tile, of which ``known`` keys are there, in the running softmax of each warp."""
    dtype: gl.constexpr = q_left.dtype
    of_keys: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    of_weights: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    warp = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(1, mma)))
    key = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, mma)))
    present = warp[:, None] * 16 + key[None, :] < known
    scores = gl.zeros([4, 16, 16], gl.float32, mma)
    scores = mma_v2(q_left, k_tiles.index(slot * 2).permute((0, 2, 1)).load(of_keys), scores)
    scores = mma_v2(q_right, k_tiles.index(slot * 2 + 1).permute((0, 2, 1)).load(of_keys), scores)
    scores = gl.where(present[:, None, :], scores * scale, float("-inf"))
    higher = gl.maximum(best, gl.max(scores, 2))
    weights = gl.exp2(scores - higher[:, :, None])
    shrink = gl.exp2(best - higher)
    total = total * shrink + gl.sum(weights, 2)
    narrow = gl.convert_layout(weights.to(dtype), of_weights)
    left = mma_v2(narrow, v_tiles.index(slot * 2).load(of_keys), left * shrink[:, :, None])
    right = mma_v2(narrow, v_tiles.index(slot * 2 + 1).load(of_keys), right * shrink[:, :, None])
    return higher, total, left, right


@gluon.jit
def _clean(value_tiles, slot, known):
    """Zeros behind the tile's first ``known`` values: there may be anything, NaN too, which no weight of zero hides."""
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    present = gl.arange(0, 64, layout=gl.SliceLayout(1, loads)) < known
    for half in gl.static_range(2):
        tile = value_tiles.index(slot * 2 + half)
        tile.store(gl.where(present[:, None], tile.load(loads), 0.0))
    gl.thread_barrier()


@gluon.jit
def _attend_tiles(
    keys, values, key_blocks, value_blocks, k_tiles, v_tiles, value_tiles, full, table, split, used, count, cached,
    last_block, column, a, b, c, d, q_left, q_right, scale, best, total, left, right, STAGES: gl.constexpr,
    mma: gl.constexpr
):  # fmt: skip
    """The program's ``count`` tiles, of which the first STAGES are on their way; a to d are the next one's blocks."""
    for step in range(0, count):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        known = cached - (split + step * used) * 64
        if known < 64:
            _clean(value_tiles, slot, known)
        best, total, left, right = _attend_tile(
            q_left, q_right, k_tiles, v_tiles, slot, known, scale, best, total, left, right, mma
        )
        if step + STAGES < count:
            e, f, g, h = _block_ids(table, split + (step + STAGES + 1) * used, last_block)
            gl.thread_barrier()
            _fetch(keys, values, key_blocks, value_blocks, full, slot, a, b, c, d, column, step >= 0)
            a, b, c, d = e, f, g, h
    return best, total, left, right


@gluon.jit
def _store_combined(parts, logs, used, target, GROUP: gl.constexpr, HEADS: gl.constexpr, SPLITS: gl.constexpr):
    """The sums of a row's splits, weighted by their logarithms, in the order of the splits."""
    layout: gl.constexpr = gl.BlockedLayout([1, SPLITS, 4], [1, 1, 32], [4, 1, 1], [2, 1, 0])
    pairs: gl.constexpr = gl.SliceLayout(2, layout)
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, pairs))
    split = gl.arange(0, SPLITS, layout=gl.SliceLayout(0, pairs))
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    is_head = (head < GROUP)[:, None]
    there = is_head & (split < used)[None, :]
    entry = split[None, :] * GROUP + head[:, None]
    log = gl.load(logs + entry, mask=there, other=float("-inf"), cache_modifier=".cg")
    place = entry[:, :, None] * 128 + column[None, None, :].to(gl.int32)
    part = gl.load(parts + place, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
    log = gl.where(is_head, log, 0.0)
    weights = gl.exp2(log - gl.max(log, 1)[:, None])
    total = gl.convert_layout(gl.sum(weights, 1), gl.SliceLayout(1, gl.SliceLayout(1, layout)))
    sums = gl.sum(part * weights[:, :, None], 1) / total[:, None]
    row = gl.arange(0, HEADS, layout=gl.SliceLayout(1, gl.SliceLayout(1, layout)))
    gl.store(
        target + row[:, None] * 128 + column[None, :], sums.to(target.dtype.element_ty), mask=(row < GROUP)[:, None]
    )


@gluon.jit
def _start(
    queries, new, key_place, value_place, cache_slot, cos_sin, query_gain, key_gain, position, head_stride, scale, eps,
    first, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, NORM: gl.constexpr, mma: gl.constexpr
):  # fmt: skip
    """Both halves of the queries, and each warp's running softmax: where ``first``, the first warp's is over the row's
    new token, which is written to the cache; the others' over none."""
    dtype: gl.constexpr = queries.dtype.element_ty
    wide: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4, 8], [4, 1, 1], [2, 1, 0])
    flat: gl.constexpr = gl.SliceLayout(0, wide)
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    lines: gl.constexpr = gl.SliceLayout(2, mma)
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, flat))
    head = gl.arange(0, 16, layout=gl.SliceLayout(1, flat))
    place = head[:, None] * head_stride + column[None, :]
    is_head = (head < GROUP)[:, None]
    at = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(0, mma)))
    behind = KV_HEADS * head_stride
    q_left = gl.load(queries + place, mask=is_head, other=0.0).to(gl.float32)
    q_right = gl.load(queries + place + 64, mask=is_head, other=0.0).to(gl.float32)
    key_left, key_right = gl.load(new + column).to(gl.float32), gl.load(new + column + 64).to(gl.float32)
    value_left, value_right = gl.load(new + behind + column), gl.load(new + behind + column + 64)
    left_start, right_start = gl.load(new + behind + at).to(gl.float32), gl.load(new + behind + at + 64).to(gl.float32)
    slot = gl.load(cache_slot)
    angle = cos_sin + position.to(gl.int64) * 128
    cos, sin = gl.load(angle + column), gl.load(angle + column + 64)
    left_gain, right_gain, key_left_gain, key_right_gain = cos, cos, cos, cos
    if NORM:
        left_gain, right_gain = gl.load(query_gain + column), gl.load(query_gain + column + 64)
        left_gain, right_gain = left_gain.to(gl.float32), right_gain.to(gl.float32)
        key_left_gain, key_right_gain = gl.load(key_gain + column), gl.load(key_gain + column + 64)
        key_left_gain, key_right_gain = key_left_gain.to(gl.float32), key_right_gain.to(gl.float32)
    squares = gl.sum(q_left * q_left + q_right * q_right, 1)[:, None]
    key_squares = gl.sum(key_left * key_left + key_right * key_right, 0)
    q_left, q_right = _turn(
        q_left, q_right, left_gain[None, :], right_gain[None, :], cos[None, :], sin[None, :], squares, eps, NORM, dtype
    )  # fmt: skip
    key_left, key_right = _turn(
        key_left, key_right, key_left_gain, key_right_gain, cos, sin, key_squares, eps, NORM, dtype
    )  # fmt: skip
    written = first & (slot >= 0) & (column >= 0)
    entry = slot * (KV_HEADS * 128) + column
    gl.store(key_place + entry, key_left, mask=written)
    gl.store(key_place + entry + 64, key_right, mask=written)
    gl.store(value_place + entry, value_left, mask=written)
    gl.store(value_place + entry + 64, value_right, mask=written)

    score = q_left.to(gl.float32) * key_left.to(gl.float32)[None, :]
    score += q_right.to(gl.float32) * key_right.to(gl.float32)[None, :]
    score = gl.convert_layout(gl.sum(score, 1) * scale, gl.SliceLayout(0, lines))
    warp = gl.arange(0, 4, layout=gl.SliceLayout(1, lines))
    mine = (warp == 0)[:, None] & first
    # A warp without any key has a finite maximum, so that nothing infinite is ever subtracted from itself.
    best = gl.where(mine, score[None, :], gl.full([4, 16], -1e30, gl.float32, lines))
    total = gl.where(mine, gl.full([4, 16], 1.0, gl.float32, lines), 0.0)
    zeros = gl.zeros([4, 16, 64], gl.float32, mma)
    left = gl.where(mine[:, :, None], left_start[None, :][None, :, :], zeros)
    right = gl.where(mine[:, :, None], right_start[None, :][None, :, :], zeros)
    nothing = gl.zeros([4, 16, 64], dtype, wide)
    q_left = gl.convert_layout(q_left[None, :, :] + nothing, operand)
    q_right = gl.convert_layout(q_right[None, :, :] + nothing, operand)
    return q_left, q_right, best, total, left, right


@gluon.jit
def _finish(
    best, total, left, right, target, parts, logs, arrivals, split, used, GROUP: gl.constexpr, HEADS: gl.constexpr,
    SPLITS: gl.constexpr, mma: gl.constexpr
):  # fmt: skip
    """The warps put together, and written: the row's result, or this split's part and, if it is the last, all."""
    rows: gl.constexpr = gl.SliceLayout(0, mma)
    top = gl.max(best, 0)
    share = gl.exp2(best - top[None, :])
    total = gl.sum(total * share, 0)
    over = gl.convert_layout(total, gl.SliceLayout(1, rows))[:, None]
    left = gl.sum(left * share[:, :, None], 0) / over
    right = gl.sum(right * share[:, :, None], 0) / over
    head = gl.arange(0, 16, layout=gl.SliceLayout(1, rows))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, rows))
    place = head[:, None] * 128 + column[None, :]
    mask = (head < GROUP)[:, None]
    if used == 1:
        gl.store(target + place, left.to(target.dtype.element_ty), mask=mask)
        gl.store(target + place + 64, right.to(target.dtype.element_ty), mask=mask)
    else:
        line = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, mma)))
        gl.store(parts + split * GROUP * 128 + place, left, mask=mask)
        gl.store(parts + split * GROUP * 128 + place + 64, right, mask=mask)
        gl.store(logs + split * GROUP + line, top + gl.log2(total), mask=line < GROUP)
        # All threads' stores come before the one thread's count, which releases them.
        gl.thread_barrier()
        if gl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == used - 1:
            _store_combined(parts, logs, used, target, GROUP, HEADS, SPLITS)
            gl.store(arrivals, 0)


@gluon.jit(do_not_specialize=["splits", "table_stride"])
def _decode_kernel(
    keys,
    values,
    queries,
    key_cache,
    value_cache,
    output,
    partials,
    partial_logs,
    arrivals,
    context_lengths,
    cache_slots,
    block_tables,
    table_rows,
    cos_sin,
    query_gain,
    key_gain,
    token_stride,
    head_stride,
    splits,
    table_stride,
    scale,
    eps,
    GROUP: gl.constexpr,
    KV_HEADS: gl.constexpr,
    STAGES: gl.constexpr,
    HEADS: gl.constexpr,
    SPLITS: gl.constexpr,
    NORM: gl.constexpr,
    TABLE_ROWS: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Grid (rows * kv heads * splits,); HEADS and SPLITS are powers of two that hold those of a group and of a row.

    With EARLY, lengths, tables and earlier tokens' keys and values are read before the former kernel ends: a kernel
    launched without stands between them and what wrote them.
    """
    if EARLY:
        _let_start()
    dtype: gl.constexpr = queries.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    cut: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3)
    split, pair = gl.program_id(0) % splits, gl.program_id(0) // splits
    kv_head, row = pair % KV_HEADS, pair // KV_HEADS
    line = row
    if TABLE_ROWS:
        line = gl.load(table_rows + row)
    context = gl.load(context_lengths + row)
    table = block_tables + line.to(gl.int64) * table_stride
    cached = context - 1
    tiles = (cached + 63) // 64
    used = gl.maximum(gl.minimum(splits, tiles), 1)
    if (split >= used) | (context <= 0):
        if EARLY:
            _wait_before()
    else:
        key_blocks = gl.allocate_shared_memory(dtype, [STAGES * 8, 16, 64], shared)
        value_blocks = gl.allocate_shared_memory(dtype, [STAGES * 8, 16, 64], shared)
        k_tiles = key_blocks._reinterpret(dtype, [STAGES * 2, 4, 16, 64], cut)
        v_tiles = value_blocks._reinterpret(dtype, [STAGES * 2, 4, 16, 64], cut)
        value_tiles = value_blocks._reinterpret(dtype, [STAGES * 2, 64, 64], shared)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for slot in gl.static_range(STAGES):
            mbarrier.init(full.index(slot), count=1)
        fence_async_shared()
        gl.thread_barrier()

        count = (tiles - split + used - 1) // used
        last_block = gl.maximum(cached - 1, 0) // 16
        column = kv_head * 128
        a, b, c, d = _block_ids(table, split, last_block)
        for slot in gl.static_range(STAGES):
            # One ahead: a tile's ids are there when it is asked for.
            e, f, g, h = _block_ids(table, split + (slot + 1) * used, last_block)
            _fetch(keys, values, key_blocks, value_blocks, full, slot, a, b, c, d, column, slot < count)
            a, b, c, d = e, f, g, h
        if EARLY:
            _wait_before()

        source = queries + row.to(gl.int64) * token_stride
        q_left, q_right, best, total, left, right = _start(
            source + kv_head * GROUP * head_stride, source + (KV_HEADS * GROUP + kv_head) * head_stride,
            key_cache + column, value_cache + column, cache_slots + row, cos_sin, query_gain, key_gain, cached,
            head_stride, scale, eps, split == 0, GROUP, KV_HEADS, NORM, mma
        )  # fmt: skip
        best, total, left, right = _attend_tiles(
            keys, values, key_blocks, value_blocks, k_tiles, v_tiles, value_tiles, full, table, split, used, count,
            cached, last_block, column, a, b, c, d, q_left, q_right, scale, best, total, left, right, STAGES, mma
        )  # fmt: skip
        _finish(
            best, total, left, right, output + (row.to(gl.int64) * KV_HEADS + kv_head) * (GROUP * 128),
            partials + pair * splits * (GROUP * 128), partial_logs + pair * splits * GROUP, arrivals + pair, split,
            used, GROUP, HEADS, SPLITS, mma
        )  # fmt: skip


_attend = Launcher(_decode_kernel)


def fits(qkv: torch.Tensor, shape: GroupedQueries, cache: tuple[torch.Tensor, ...]) -> bool:
    """Whether the kernel takes what ``decode_attention.attend_fused`` takes."""
    keys = cache[0]
    halves = shape.head_dim == WIDTH and shape.cos_sin.shape[1] == WIDTH and shape.cos_sin.dtype is torch.float32
    narrow = qkv.dtype in (torch.bfloat16, torch.float16) and keys.dtype == qkv.dtype
    return halves and narrow and keys.shape[1] == BLOCK and shape.heads // shape.kv_heads <= MOST_GROUP


def choose_splits(rows: int, kv_heads: int, longest_context: int, resident: int) -> int:
    """So many that ``resident`` programs find work, and none has less than a tile of the longest row."""
    return max(1, min(resident // (rows * kv_heads), -(-longest_context // KEYS), MOST_SPLITS))


def attend_fused(
    qkv: torch.Tensor,
    shape: GroupedQueries,
    cache: tuple[torch.Tensor, ...],
    batch: AttentionBatch,
    splits: int | None = None,
    stages: int = STAGES,
) -> torch.Tensor:
    """As ``decode_attention.attend_fused``, for what ``fits``. ``splits`` are chosen if not given."""
    keys, values = cache[:2]
    rows, kv_heads, device = batch.context_lengths.shape[0], shape.kv_heads, qkv.device
    group, early = shape.heads // kv_heads, starts_early(device)
    resident = PROGRAMS * processors(device)
    splits = splits or choose_splits(rows, kv_heads, batch.longest_context, resident)
    output = torch.empty((qkv.shape[0], shape.heads * WIDTH), dtype=qkv.dtype, device=device)
    partials = logs = arrivals = output
    if splits > 1:
        partials = torch.empty((rows * kv_heads * splits * group, WIDTH), dtype=torch.float32, device=device)
        logs = torch.empty(rows * kv_heads * splits * group, dtype=torch.float32, device=device)
        arrivals = counters(device).arrivals
    query_gain, key_gain, eps, normed = output, output, 0.0, False
    if shape.query_norm is not None and shape.key_norm is not None:
        query_gain, key_gain, eps, normed = shape.query_norm.weight, shape.key_norm.weight, shape.key_norm.eps, True
    tables, line = batch.block_tables, batch.table_rows
    _attend(
        (rows * kv_heads * splits, 1, 1),
        (
            qkv,
            keys,
            values,
            output,
            partials,
            logs,
            arrivals,
            batch.context_lengths,
            batch.cache_slots,
            tables,
            tables if line is None else line,
            shape.cos_sin,
            query_gain,
            key_gain,
        ),
        fixed=(qkv.stride(0), WIDTH),
        free=(splits, tables.stride(0), shape.scale * LOG2_E, eps),
        constants=(
            group,
            kv_heads,
            stages,
            max(4, triton.next_power_of_2(group)),
            triton.next_power_of_2(splits),
            normed,
            line is not None,
            early,
        ),
        warps=WARPS,
        early=early,
        tiled=tuple(Tiled(one.view(-1, kv_heads * WIDTH), (BLOCK, HALF)) for one in (keys, values)),
    )
    return output
