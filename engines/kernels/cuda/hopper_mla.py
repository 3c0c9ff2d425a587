"""Attention of latent decodes (MLA) on Hopper: the work of ``mla_kernels.attend_kernel`` for a cache of 16-bit numbers.

A program takes parts of rows, one after the other. One warp moves blocks of the cache into a ring in shared memory
(the tensor memory accelerator), a tile of 64 keys in pieces of some of its columns, and goes on with the program's next
part while the last one is still multiplied; a group of four warps multiplies. Keys stand on the left, so that the 16
heads need not be filled up: scores are a tile times the queries, sums the same tile, transposed, times the weights.

Parts are taken in rounds, every other one backwards, so that who began with most goes on with least where rows come
longest first. Which program takes a part changes nothing in it. Written in Gluon: Triton waits for every product.
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
from engines.kernels.cuda.device import processors
from engines.kernels.cuda.launch import Launcher, Tiled
from engines.kernels.reference import AttentionBatch

HEADS, RANK, ROPE = 16, 512, 64
KEYS, COLUMNS = 64, 64
"""Of a tile; of those that lie together in shared memory, 128 bytes."""
SMALLEST_BLOCK = 8
"""Of the cache: rows after which the pattern of addresses in shared memory repeats."""
PIECES, STAGES = 3, 7
"""Of a tile, 1, 3 or 9, and such pieces in shared memory: at least as many as a tile has, 16 KB or more left free."""
PERSISTENT = True
"""One program for each processor. Else one for each part."""
MOVER_REGISTERS = 80


@gluon.jit
def _let_start():
    """The next kernel in the stream may start while this one runs."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _await_former():
    """Until the kernel before this one in the stream has ended."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _part(turn, items, splits, query_starts, context_lengths, KEYS: gl.constexpr):
    """What the program does in this round: a row, its part, its query, the part's first key, its end, and its tiles:
    none behind the last part, nor of a row that has not exactly one query."""
    programs, program = gl.num_programs(0), gl.program_id(0)
    number = turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)
    inside = gl.minimum(number, items - 1)
    row, split = inside // splits, inside % splits
    start = gl.load(query_starts + row)
    count = gl.load(query_starts + row + 1) - start
    context = gl.load(context_lengths + row)
    size = ((context + splits - 1) // splits + KEYS - 1) // KEYS * KEYS
    begin = split * size
    end = gl.minimum(begin + size, context)
    keys = gl.where((number < items) & (count == 1), gl.maximum(end - begin, 0), 0)
    return row, split, start, begin, end, (keys + KEYS - 1) // KEYS


@gluon.jit
def _move_queries(queries, q, q_full, q_empty, start, taken):
    """The first waits, for what came before the barriers' first phase, end at once: here and below."""
    buffer = taken % 2
    mbarrier.wait(q_empty.index(buffer), taken // 2 & 1 ^ 1)
    mbarrier.expect(q_full.index(buffer), 9 * 16 * 128)
    for panel in gl.static_range(9):
        tma.async_copy_global_to_shared(
            queries, [start * 16, panel * 64], q_full.index(buffer), q.index(buffer * 9 + panel)
        )


@gluon.jit
def _move(
    queries, cache, q, blocks, full, empty, q_full, q_empty, query_starts, context_lengths, block_tables, table_rows,
    items, splits, table_stride, BLOCK: gl.constexpr, KEYS: gl.constexpr, PIECES: gl.constexpr, STAGES: gl.constexpr,
    TABLE_ROWS: gl.constexpr, EARLY: gl.constexpr
):  # fmt: skip
    """The moving warp."""
    parts: gl.constexpr = KEYS // BLOCK
    panels: gl.constexpr = 9 // PIECES
    rounds = (items + gl.num_programs(0) - 1) // gl.num_programs(0)
    position, taken = items * 0, items * 0
    if EARLY:
        _await_former()
    for turn in range(0, rounds):
        row, _, start, begin, end, steps = _part(turn, items, splits, query_starts, context_lengths, KEYS)
        if steps > 0:
            line = row
            if TABLE_ROWS:
                line = gl.load(table_rows + row)
            table = block_tables + line.to(gl.int64) * table_stride + begin // BLOCK
            last = (end - 1) // BLOCK - begin // BLOCK
            _move_queries(queries, q, q_full, q_empty, start, taken)
            for step in range(0, steps):
                lines = ()
                for part in gl.static_range(parts):
                    # Behind the part's last block that block again: whatever lies there is masked.
                    lines += (gl.load(table + gl.minimum(step * parts + part, last)) * BLOCK,)  # type: ignore[assignment]
                for piece in gl.static_range(PIECES):
                    place = position % STAGES
                    mbarrier.wait(empty.index(place), position // STAGES & 1 ^ 1)
                    mbarrier.expect(full.index(place), panels * KEYS * 128)
                    for panel in gl.static_range(panels):
                        for part in gl.static_range(parts):
                            tma.async_copy_global_to_shared(
                                cache, [lines[part], (piece * panels + panel) * 64], full.index(place),
                                blocks.index((place * panels + panel) * parts + part)
                            )  # fmt: skip
                    position += 1
            taken += 1


@gluon.jit
def _clean(tile, known):
    """Zeros behind the first ``known`` keys: behind a part's end may be NaN, which no weight of zero hides."""
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    present = gl.arange(0, 64, layout=gl.SliceLayout(1, loads)) < known
    tile.store(gl.where(present[:, None], tile.load(loads), 0.0))


@gluon.jit
def _write(partials, partial_logs, entry, sums, total, best, WHOLE: gl.constexpr, layout: gl.constexpr):
    """A part's sums, and the logarithm of its total. Each thread writes 8 numbers that lie together."""
    writes: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    whole = gl.sum(total, 0)
    share = (1.0 / whole)[None, :]
    dim = gl.arange(0, 64, layout=gl.SliceLayout(1, writes))
    head = gl.arange(0, 16, layout=gl.SliceLayout(0, writes))
    target = partials + entry.to(gl.int64) * (16 * 512) + (head[None, :] * 512 + dim[:, None])
    for panel in gl.static_range(8):
        result = gl.convert_layout((sums[panel] * share).to(partials.dtype.element_ty), writes)
        gl.store(target + panel * 64, result)
    if not WHOLE:
        own = gl.arange(0, 16, layout=gl.SliceLayout(0, layout))
        gl.store(partial_logs + entry.to(gl.int64) * 16 + own, best + gl.log2(whole))


@gluon.jit
def _attend_part(
    q, tiles, p, full, empty, buffer, position, steps, keys, scale, PIECES: gl.constexpr, STAGES: gl.constexpr,
    layout: gl.constexpr
):  # fmt: skip
    """Sums (8 x (64, 16): columns by heads), total of each thread's weights and maximum of a part of ``keys`` keys."""
    panels: gl.constexpr = 9 // PIECES
    best = gl.full([16], float("-inf"), gl.float32, gl.SliceLayout(0, layout))
    total = gl.zeros([64, 16], gl.float32, layout)
    sums = ()
    for _panel in gl.static_range(8):
        sums += (gl.zeros([64, 16], gl.float32, layout),)  # type: ignore[assignment]
    key = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    for step in range(0, steps):
        first = position + step * PIECES
        scores = gl.zeros([64, 16], gl.float32, layout)
        for piece in gl.static_range(PIECES):
            place = (first + piece) % STAGES
            mbarrier.wait(full.index(place), (first + piece) // STAGES & 1)
            for panel in gl.static_range(panels):
                query = q.index(buffer * 9 + piece * panels + panel).permute((1, 0))
                scores = warpgroup_mma(tiles.index(place * panels + panel), query, scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        known = keys - step * 64
        scores = gl.where((key < known)[:, None], scores, float("-inf"))
        higher = gl.maximum(best, gl.max(scores, 0) * scale)
        weights = gl.exp2(scores * scale - higher[None, :])
        shrink = gl.exp2(best - higher)[None, :]
        total = total * shrink + weights
        best = higher
        p.permute((1, 0)).store(weights.to(p.dtype))
        if known < 64:
            for panel in gl.static_range(8):
                place = (first + panel // panels) % STAGES
                _clean(tiles.index(place * panels + panel % panels), known)
        fence_async_shared()
        gl.thread_barrier()
        shrunk = ()
        for panel in gl.static_range(8):
            place = (first + panel // panels) % STAGES
            values = tiles.index(place * panels + panel % panels).permute((1, 0))
            added = warpgroup_mma(values, p.permute((1, 0)), sums[panel] * shrink, is_async=True)
            shrunk += (added,)  # type: ignore[assignment]
        sums = shrunk
        for piece in gl.static_range(PIECES):
            sums = warpgroup_mma_wait(8 - panels * (piece + 1) if piece < PIECES - 1 else 0, deps=sums)
            gl.thread_barrier()
            mbarrier.arrive(empty.index((first + piece) % STAGES), count=1)
    return sums, total, best


@gluon.jit
def _multiply(
    q, tiles, p, full, empty, q_full, q_empty, partials, partial_logs, query_starts, context_lengths, items, splits,
    scale, KEYS: gl.constexpr, PIECES: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr
):  # fmt: skip
    """The group of four warps."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    rounds = (items + gl.num_programs(0) - 1) // gl.num_programs(0)
    position, taken = items * 0, items * 0
    for turn in range(0, rounds):
        row, split, _, begin, end, steps = _part(turn, items, splits, query_starts, context_lengths, KEYS)
        if steps > 0:
            buffer = taken % 2
            mbarrier.wait(q_full.index(buffer), taken // 2 & 1)
            sums, total, best = _attend_part(
                q, tiles, p, full, empty, buffer, position, steps, end - begin, scale, PIECES, STAGES, layout
            )
            mbarrier.arrive(q_empty.index(buffer), count=1)
            _write(partials, partial_logs, row * splits + split, sums, total, best, WHOLE, layout)
            position += steps * PIECES
            taken += 1


@gluon.jit(do_not_specialize=["items", "splits", "table_stride"])
def hopper_attend_kernel(
    queries,
    cache,
    partials,
    partial_logs,
    query_starts,
    context_lengths,
    block_tables,
    table_rows,
    items,
    splits,
    table_stride,
    scale,
    BLOCK: gl.constexpr,
    KEYS: gl.constexpr,
    PIECES: gl.constexpr,
    STAGES: gl.constexpr,
    TABLE_ROWS: gl.constexpr,
    WHOLE: gl.constexpr,
    EARLY: gl.constexpr,
    MOVER_REGISTERS: gl.constexpr,
):
    """Grid (any number,), four warps: the group that multiplies. ``items`` are parts of all rows."""
    if EARLY:
        _let_start()
    dtype: gl.constexpr = cache.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    panels: gl.constexpr = 9 // PIECES
    blocks = gl.allocate_shared_memory(dtype, [STAGES * panels * (KEYS // BLOCK), BLOCK, 64], layout)
    tiles = blocks._reinterpret(dtype, [STAGES * panels, KEYS, 64], layout)
    q = gl.allocate_shared_memory(dtype, [2 * 9, 16, 64], layout)
    p = gl.allocate_shared_memory(dtype, [1, 16, 64], layout).index(0)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(STAGES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=1)
    for buffer in gl.static_range(2):
        mbarrier.init(q_full.index(buffer), count=1)
        mbarrier.init(q_empty.index(buffer), count=1)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_multiply, (q, tiles, p, full, empty, q_full, q_empty, partials, partial_logs, query_starts,
                         context_lengths, items, splits, scale, KEYS, PIECES, STAGES, WHOLE)),
            (_move, (queries, cache, q, blocks, full, empty, q_full, q_empty, query_starts, context_lengths,
                     block_tables, table_rows, items, splits, table_stride, BLOCK, KEYS, PIECES, STAGES, TABLE_ROWS,
                     EARLY)),
        ],
        [1],
        [MOVER_REGISTERS],
    )  # fmt: skip


_attend = Launcher(hopper_attend_kernel)


def fits(heads: int, rank: int, rope: int, cache: torch.Tensor) -> bool:
    """Whether the kernel takes latents of these widths in such a cache."""
    widths = (heads, rank, rope) == (HEADS, RANK, ROPE)
    return widths and cache.dtype == torch.bfloat16 and cache.shape[1] in (8, 16, 32, 64)


def attend_parts(
    absorbed: torch.Tensor,
    cache: torch.Tensor,
    partials: torch.Tensor,
    logs: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    early: bool,
) -> None:
    """(rows, 16, 576) absorbed queries -> ``partials``, (rows, splits, 16, 512): in the queries' type the results where
    ``splits`` is 1; else float32, with the binary logarithms of the totals in ``logs``, (rows, splits, 16)."""
    rows, splits = partials.shape[:2]
    tables, line, items = batch.block_tables, batch.table_rows, rows * splits
    _attend(
        (min(items, processors(absorbed.device)) if PERSISTENT else items, 1, 1),
        (partials, logs, batch.query_starts, batch.context_lengths, tables, tables if line is None else line),
        fixed=(),
        free=(items, splits, tables.stride(0), scale * LOG2_E),
        constants=(cache.shape[1], KEYS, PIECES, STAGES, line is not None, splits == 1, early, MOVER_REGISTERS),
        warps=4,
        early=early,
        tiled=(
            Tiled(absorbed.view(-1, RANK + ROPE), (HEADS, COLUMNS)),
            Tiled(cache.view(-1, RANK + ROPE), (cache.shape[1], COLUMNS)),
        ),
    )
