"""Attention of prompts and chunks on Hopper: one program for each processor walks over tiles of all rows.

A tile's 128 lines are (token, query head) pairs as in ``engines.kernels.cuda.prefill_attention``, which serves all that
this file does not take. One warp finds tiles and moves blocks of the cache into shared memory (the tensor memory
accelerator: no addresses, no masks, no registers); in what order tiles are taken, and by whom, is told in
``hopper_tiles``. Two groups of four warps multiply 64 lines each, as told in ``hopper_products``.

Written in Gluon, Triton's lower level: Triton itself waits for every product as soon as it is started.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from engines.kernels.cuda.attention import LOG2_E
from engines.kernels.cuda.device import processors
from engines.kernels.cuda.hopper_products import multiply_tiles
from engines.kernels.cuda.hopper_tiles import find_tile, levels, move_tiles
from engines.kernels.cuda.launch import Launcher, Tiled
from engines.kernels.cuda.scratch import counters
from engines.kernels.reference import AttentionBatch

WIDTH = 128
"""Of a head."""
HALF = 64
"""Columns that lie together in shared memory, 128 bytes, and lines of a group."""
LINES = 2 * HALF
KEYS = 64
STAGES = 3
"""Tiles of keys, and of values, in shared memory."""
SMALLEST_BLOCK = 8
"""Of the cache: rows after which the pattern of addresses in shared memory repeats."""
MOST_ROWS = 256
"""That a program orders the tiles of."""
GROUP_REGISTERS, MOVER_REGISTERS = 216, 80


@gluon.jit
def _let_start():
    """The next kernel in the stream may start while this one runs."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


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
    drawn,
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
    ROWS: gl.constexpr,
    TABLE_ROWS: gl.constexpr,
    GROUP_REGISTERS: gl.constexpr,
    MOVER_REGISTERS: gl.constexpr,
):
    """Grid (any number,), four warps: the first group. At most ROWS rows from ``first_row`` on."""
    _let_start()
    dtype: gl.constexpr = queries.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    parts: gl.constexpr = KEYS // BLOCK
    first_q = gl.allocate_shared_memory(dtype, [4, 64, 64], layout)
    second_q = gl.allocate_shared_memory(dtype, [4, 64, 64], layout)
    key_blocks = gl.allocate_shared_memory(dtype, [STAGES * 2 * parts, BLOCK, 64], layout)
    value_blocks = gl.allocate_shared_memory(dtype, [STAGES * 2 * parts, BLOCK, 64], layout)
    k_tiles = key_blocks._reinterpret(dtype, [STAGES * 2, KEYS, 64], layout)
    v_tiles = value_blocks._reinterpret(dtype, [STAGES * 2, KEYS, 64], layout)
    notes = gl.allocate_shared_memory(gl.int32, [64, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    gl.thread_barrier()

    lowest, tiles, above, total = levels(
        query_starts, context_lengths, first_row, rows, skip_single, GROUP, ROWS, 4
    )  # fmt: skip
    units = total * KV_HEADS
    more = gl.program_id(0) < units
    unit = gl.maximum(gl.minimum(gl.program_id(0), units - 1), 0)
    row, start, count, earlier, tile, level = find_tile(
        unit // KV_HEADS, lowest, tiles, above, query_starts, context_lengths, first_row, rows, GROUP
    )
    kv_head = unit % KV_HEADS
    heads: gl.constexpr = GROUP * KV_HEADS
    gl.warp_specialize(
        [
            (multiply_tiles, (first_q, k_tiles, v_tiles, full, empty, notes, queries, output, token_stride,
                               head_stride, start, count, earlier, tile, kv_head, more, scale, heads, GROUP, KEYS,
                               STAGES, 0)),
            (multiply_tiles, (second_q, k_tiles, v_tiles, full, empty, notes, queries, output, token_stride,
                               head_stride, start, count, earlier, tile, kv_head, more, scale, heads, GROUP, KEYS,
                               STAGES, 1)),
            (move_tiles, (keys, values, key_blocks, value_blocks, full, empty, notes, drawn, query_starts,
                          context_lengths, block_tables, table_rows, rows, first_row, table_stride, skip_single, row,
                          count, earlier, tile, level, more, GROUP, KV_HEADS, BLOCK, KEYS, STAGES, ROWS, TABLE_ROWS)),
        ],
        [4, 1],
        [GROUP_REGISTERS, MOVER_REGISTERS],
    )  # fmt: skip


_attend = Launcher(_hopper_kernel)


def fits(queries: torch.Tensor, keys: torch.Tensor, rows: int) -> bool:
    """Whether the kernel takes a cache of keys that ``prefill_attention`` takes, and so many rows behind
    ``decode_rows``."""
    block_fits = keys.shape[3] == WIDTH and SMALLEST_BLOCK <= keys.shape[1] <= KEYS
    return block_fits and keys.dtype == queries.dtype and rows <= MOST_ROWS


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
        (min(tiles * kv_heads, processors(queries.device)), 1, 1),
        (
            queries,
            output,
            batch.query_starts,
            batch.context_lengths,
            tables,
            tables if line is None else line,
            counters(queries.device).drawn,
        ),
        fixed=queries.stride()[:2],
        free=(rows, batch.decode_rows or 0, tables.stride(0), int(not known), scale * LOG2_E),
        constants=(
            queries.shape[1] // kv_heads,
            kv_heads,
            block_size,
            at_once,
            stages,
            MOST_ROWS,
            line is not None,
            GROUP_REGISTERS,
            MOVER_REGISTERS,
        ),
        warps=4,
        tiled=tuple(Tiled(one.view(-1, kv_heads * WIDTH), (block_size, HALF)) for one in (keys, values)),
    )
