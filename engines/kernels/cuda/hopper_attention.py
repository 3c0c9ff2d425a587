"""Attention of prompts and chunks on Hopper: loads, and two groups of products, on warps of their own.

A tile's 128 lines are (token, query head) pairs as in ``engines.kernels.cuda.prefill_attention``, which finds them in
the same way and serves all that this file does not take. One warp moves blocks of the cache into shared memory (the
tensor memory accelerator: no addresses, no masks, no registers); two groups of four warps multiply 64 lines each. A
group starts the scores of the next keys, then the sums over the last ones, and takes the softmax of the scores while
the sums are still being computed; and while one group takes its softmax, the other's products run. The method is that
of FlashAttention-3 (Shah et al. 2024), for a cache in blocks.

Written in Gluon, Triton's lower level: Triton itself waits for every product as soon as it is started.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from engines.kernels.cuda.attention import LOG2_E
from engines.kernels.cuda.launch import Launcher, Tiled
from engines.kernels.reference import AttentionBatch

WIDTH = 128
"""Of a head."""
HALF = 64
"""Columns that lie together in shared memory, 128 bytes, and lines of a group."""
LINES = 2 * HALF
KEYS = 64
STAGES = 3
"""Tiles of keys, and of values, in shared memory."""
ROWS_AT_ONCE = 256
GROUP_REGISTERS, MOVER_REGISTERS = 240, 24
SMALLEST_BLOCK = 8
"""Of the cache: rows after which the pattern of addresses in shared memory repeats."""


@gluon.jit
def _add(left, right):
    return left + right


@gluon.jit
def _let_start():
    """The next kernel in the stream may start while this one runs."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _find_row(query_starts, first_row, rows, number, skip_single, GROUP: gl.constexpr, ROWS: gl.constexpr):
    """The row of the tile of this number, tiles before the row's, and tiles of all rows."""
    layout: gl.constexpr = gl.BlockedLayout([ROWS // 32], [32], [4], [0])  # each warp for itself
    found = first_row
    before, seen = 0, 0
    for first in range(first_row, rows, ROWS):
        row = first + gl.arange(0, ROWS, layout=layout)
        start = gl.load(query_starts + row, mask=row < rows, other=0)
        count = gl.load(query_starts + row + 1, mask=row < rows, other=0) - start
        tiles = gl.where((count == 1) & (skip_single != 0), 0, (count * GROUP + 127) // 128)
        earlier = seen + gl.associative_scan(tiles, 0, _add) <= number
        found += gl.sum(earlier.to(gl.int32), 0)
        before += gl.sum(gl.where(earlier, tiles, 0), 0)
        seen += gl.sum(tiles, 0)
    return found, before, seen


@gluon.jit
def _move(
    keys, values, key_blocks, value_blocks, full, empty, table, last_block, column, steps, BLOCK: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """The moving warp: in step j keys of tile j and values of tile j - 1, which are needed together."""
    parts: gl.constexpr = KEYS // BLOCK
    for step in range(0, steps):
        slot = step % STAGES
        if step >= STAGES:
            mbarrier.wait(empty.index(slot), (step // STAGES - 1) & 1)
        some_keys, some_values = step < steps - 1, step > 0
        # An expectation is an arrival too, so there is one in each step.
        both = some_keys & some_values
        mbarrier.expect(full.index(slot), 2 * KEYS * 256, pred=both)
        mbarrier.expect(full.index(slot), KEYS * 256, pred=both == 0)
        for part in gl.static_range(parts):
            ahead = gl.load(table + gl.minimum(step * parts + part, last_block)) * BLOCK
            behind = gl.load(table + gl.minimum(gl.maximum(step - 1, 0) * parts + part, last_block)) * BLOCK
            for half in gl.static_range(2):
                place = (slot * 2 + half) * parts + part
                where = column + half * 64
                tma.async_copy_global_to_shared(
                    keys, [ahead, where], full.index(slot), key_blocks.index(place), pred=some_keys
                )
                tma.async_copy_global_to_shared(
                    values, [behind, where], full.index(slot), value_blocks.index(place), pred=some_values
                )


@gluon.jit
def _scores(q, k_tiles, slot, KEYS: gl.constexpr, layout: gl.constexpr):
    scores = gl.zeros([64, KEYS], gl.float32, layout)
    scores = warpgroup_mma(q.index(0), k_tiles.index(slot * 2).permute((1, 0)), scores, use_acc=False, is_async=True)
    return warpgroup_mma(q.index(1), k_tiles.index(slot * 2 + 1).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _softmax(scores, last, first, scale, best, total, KEYS: gl.constexpr, MASKED: gl.constexpr, layout: gl.constexpr):
    """Weights of one more tile of scores, the running maximum and total, and what the sums shrink by."""
    if MASKED:
        place = first + gl.arange(0, KEYS, layout=gl.SliceLayout(0, layout))
        scores = gl.where(place[None, :] <= last[:, None], scores, float("-inf"))
    higher = gl.maximum(best, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - higher[:, None])
    shrink = gl.exp2(best - higher)
    return weights, higher, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _attend_range(
    begin, end, q, k_tiles, v_tiles, full, empty, last, scale, best, total, weights, left, right,
    KEYS: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, layout: gl.constexpr, sums_layout: gl.constexpr
):  # fmt: skip
    """Scores of tiles ``begin`` to ``end``, and the sums of the tile before each."""
    for step in range(begin, end):
        slot = step % STAGES
        scores = _scores(q, k_tiles, slot, KEYS, layout)
        left = warpgroup_mma(weights, v_tiles.index(slot * 2), left, is_async=True)
        right = warpgroup_mma(weights, v_tiles.index(slot * 2 + 1), right, is_async=True)
        scores = warpgroup_mma_wait(2, deps=(scores,))
        wide, best, total, shrink = _softmax(scores, last, step * KEYS, scale, best, total, KEYS, MASKED, layout)
        fresh = gl.convert_layout(wide.to(weights.dtype), weights.type.layout)
        # The next step is waited for here because ptxas moves no softmax past a loop: it belongs before the next line.
        mbarrier.wait(full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1)
        left, right, weights, fresh, total = warpgroup_mma_wait(0, deps=(left, right, weights, fresh, total))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(slot), count=1)
        factor = gl.convert_layout(shrink, gl.SliceLayout(1, sums_layout))[:, None]
        left *= factor
        right *= factor
        weights = fresh
    return best, total, weights, left, right


@gluon.jit
def _multiply(
    q, k_tiles, v_tiles, full, empty, queries, output, token_stride, head_stride, start, count, earlier, tile, kv_head,
    steps, scale, HEADS: gl.constexpr, GROUP: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    SECOND: gl.constexpr
):  # fmt: skip
    """A group of four warps: the tile's first 64 lines, or the SECOND ones. ``steps`` tiles of keys and one more."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    if steps > 0:
        line = tile * 128 + SECOND * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, loads))
        column = gl.arange(0, 64, layout=gl.SliceLayout(0, loads))
        token, head = line // GROUP, kv_head * GROUP + line % GROUP
        source = queries + (start + token).to(gl.int64)[:, None] * token_stride + head[:, None] * head_stride
        source += column[None, :]
        mask = (token < count)[:, None]
        q.index(0).store(gl.load(source, mask=mask, other=0.0))
        q.index(1).store(gl.load(source + 64, mask=mask, other=0.0))
        fence_async_shared()
        gl.thread_barrier()

        rows: gl.constexpr = gl.SliceLayout(1, layout)
        line = tile * 128 + SECOND * 64 + gl.arange(0, 64, layout=rows)
        last = earlier + gl.minimum(line // GROUP, count - 1)
        # Whole tiles of keys that every line of the tile sees.
        common = (earlier + tile * 128 // GROUP + 1) // KEYS
        end = earlier + gl.minimum(count, (tile * 128 + 127) // GROUP + 1)

        best = gl.full([64], float("-inf"), gl.float32, rows)
        total = gl.zeros([64], gl.float32, rows)
        left = gl.zeros([64, 64], gl.float32, sums_layout)
        right = gl.zeros([64, 64], gl.float32, sums_layout)
        mbarrier.wait(full.index(0), 0)
        scores = warpgroup_mma_wait(0, deps=(_scores(q, k_tiles, 0, KEYS, layout),))
        wide, best, total, _ = _softmax(scores, last, 0, scale, best, total, KEYS, True, layout)
        gl.thread_barrier()
        mbarrier.arrive(empty.index(0), count=1)
        weights = gl.convert_layout(wide.to(queries.dtype.element_ty), weights_layout)
        mbarrier.wait(full.index(1 % STAGES), (1 // STAGES) & 1)
        best, total, weights, left, right = _attend_range(
            1, gl.maximum(common, 1), q, k_tiles, v_tiles, full, empty, last, scale, best, total, weights, left, right,
            KEYS, STAGES, False, layout, sums_layout
        )  # fmt: skip
        best, total, weights, left, right = _attend_range(
            gl.maximum(common, 1), steps, q, k_tiles, v_tiles, full, empty, last, scale, best, total, weights, left,
            right, KEYS, STAGES, True, layout, sums_layout
        )  # fmt: skip

        slot = steps % STAGES
        # What lies behind a row's end may be anything, NaN too, which a weight of zero does not hide.
        known = (steps - 1) * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, loads)) < end
        for half in gl.static_range(2):
            v = v_tiles.index(slot * 2 + half)
            v.store(gl.where(known[:, None], v.load(loads), 0.0))
        fence_async_shared()
        gl.thread_barrier()
        left = warpgroup_mma(weights, v_tiles.index(slot * 2), left, is_async=True)
        right = warpgroup_mma(weights, v_tiles.index(slot * 2 + 1), right, is_async=True)
        left, right, weights = warpgroup_mma_wait(0, deps=(left, right, weights))

        share = gl.convert_layout(1.0 / total, gl.SliceLayout(1, sums_layout))[:, None]
        line = tile * 128 + SECOND * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, sums_layout))
        column = gl.arange(0, 64, layout=gl.SliceLayout(0, sums_layout))
        token, head = line // GROUP, kv_head * GROUP + line % GROUP
        target = output + ((start + token).to(gl.int64) * HEADS + head)[:, None] * 128 + column[None, :]
        mask = (token < count)[:, None]
        gl.store(target, (left * share).to(output.dtype.element_ty), mask=mask)
        gl.store(target + 64, (right * share).to(output.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["rows", "first_row", "table_stride", "skip_single"])
def _hopper_kernel(
    keys,
    values,
    queries,
    output,
    query_starts,
    context_lengths,
    block_tables,
    table_rows,
    token_stride,
    head_stride,
    rows,
    first_row,
    table_stride,
    skip_single,
    scale,
    GROUP: gl.constexpr,
    KV_HEADS: gl.constexpr,
    BLOCK: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS_AT_ONCE: gl.constexpr,
    TABLE_ROWS: gl.constexpr,
    GROUP_REGISTERS: gl.constexpr,
    MOVER_REGISTERS: gl.constexpr,
):
    """Grid (tiles * kv heads,), four warps: the first group. Programs that find no tile take no step."""
    _let_start()
    dtype: gl.constexpr = queries.dtype.element_ty
    kv_head, number = gl.program_id(0) % KV_HEADS, gl.program_id(0) // KV_HEADS
    row, before, total = _find_row(query_starts, first_row, rows, number, skip_single, GROUP, ROWS_AT_ONCE)
    row = gl.minimum(row, rows - 1)
    start = gl.load(query_starts + row)
    count = gl.load(query_starts + row + 1) - start
    # The heaviest of a row first.
    tile = (count * GROUP + 127) // 128 - 1 - (number - before)
    context = gl.load(context_lengths + row)
    line = row
    if TABLE_ROWS:
        line = gl.load(table_rows + row)
    table = block_tables + line.to(gl.int64) * table_stride
    earlier = context - count
    end = gl.minimum(context, earlier + (tile * 128 + 127) // GROUP + 1)
    steps = gl.where(number < total, (end + KEYS - 1) // KEYS, 0)

    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    parts: gl.constexpr = KEYS // BLOCK
    first_q = gl.allocate_shared_memory(dtype, [2, 64, 64], layout)
    second_q = gl.allocate_shared_memory(dtype, [2, 64, 64], layout)
    key_blocks = gl.allocate_shared_memory(dtype, [STAGES * 2 * parts, BLOCK, 64], layout)
    value_blocks = gl.allocate_shared_memory(dtype, [STAGES * 2 * parts, BLOCK, 64], layout)
    k_tiles = key_blocks._reinterpret(dtype, [STAGES * 2, KEYS, 64], layout)
    v_tiles = value_blocks._reinterpret(dtype, [STAGES * 2, KEYS, 64], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    gl.thread_barrier()

    heads: gl.constexpr = GROUP * KV_HEADS
    last_block = (context - 1) // BLOCK
    gl.warp_specialize(
        [
            (_multiply, (first_q, k_tiles, v_tiles, full, empty, queries, output, token_stride, head_stride, start,
                         count, earlier, tile, kv_head, steps, scale, heads, GROUP, KEYS, STAGES, 0)),
            (_multiply, (second_q, k_tiles, v_tiles, full, empty, queries, output, token_stride, head_stride, start,
                         count, earlier, tile, kv_head, steps, scale, heads, GROUP, KEYS, STAGES, 1)),
            (_move, (keys, values, key_blocks, value_blocks, full, empty, table, last_block, kv_head * 128,
                     gl.where(steps > 0, steps + 1, 0), BLOCK, KEYS, STAGES)),
        ],
        [4, 1],
        [GROUP_REGISTERS, MOVER_REGISTERS],
    )  # fmt: skip


_attend = Launcher(_hopper_kernel)


def fits(queries: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether the kernel takes a cache of keys that ``prefill_attention`` takes."""
    return keys.shape[3] == WIDTH and SMALLEST_BLOCK <= keys.shape[1] <= KEYS and keys.dtype == queries.dtype


def attend_chunks(
    queries: torch.Tensor,
    cache: tuple[torch.Tensor, ...],
    batch: AttentionBatch,
    scale: float,
    output: torch.Tensor,
    tiles: int,
    at_once: int = KEYS,
    stages: int = STAGES,
) -> None:
    """Into ``output``, as ``prefill_attention.attend_chunks``; ``tiles`` bounds those of all rows for one head.

    ``at_once`` keys are multiplied at once, ``stages`` such tiles of them are in shared memory.
    """
    keys, values = cache[:2]
    block_size, kv_heads = keys.shape[1:3]
    tables, line = batch.block_tables, batch.table_rows
    rows, known = min(batch.context_lengths.shape[0], queries.shape[0]), batch.decode_rows is not None
    _attend(
        (tiles * kv_heads, 1, 1),
        (
            queries,
            output,
            batch.query_starts,
            batch.context_lengths,
            tables,
            tables if line is None else line,
        ),
        fixed=queries.stride()[:2],
        free=(rows, batch.decode_rows or 0, tables.stride(0), int(not known), scale * LOG2_E),
        constants=(
            queries.shape[1] // kv_heads,
            kv_heads,
            block_size,
            at_once,
            stages,
            ROWS_AT_ONCE,
            line is not None,
            GROUP_REGISTERS,
            MOVER_REGISTERS,
        ),
        warps=4,
        tiled=tuple(Tiled(one.view(-1, kv_heads * WIDTH), (block_size, HALF)) for one in (keys, values)),
    )
