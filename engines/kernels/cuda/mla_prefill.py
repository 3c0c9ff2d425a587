"""Multi-head latent attention of prompts in the expanded form: keys and values of each head, out of the cached latents.

For rows of many tokens that takes a third to a fourth of the multiplications of the absorbed form. ``gather`` brings
the rows' latents together out of the cache, one product expands them, and ``attend`` reads them without block tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from engines.kernels.cuda.attention import LOG2_E
from engines.kernels.cuda.launch import Launcher
from engines.kernels.reference import AttentionBatch

if TYPE_CHECKING:
    from engines.kernels.latent_attention import LatentQueries

TILE_M, TILE_N = 128, 64
WARPS, STAGES = 8, 3


@triton.jit
def _find_row(
    query_starts, context_lengths, first_row, rows, TILE: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr
):
    """Which row this program works on (``rows`` and more: none), which of its parts, and the row's first block.

    Rows have parts of TILE tokens of this step, or with TILE 0 of a cache block.
    """
    row = tl.arange(0, BLOCKS)
    inside = row < rows
    begin = tl.load(query_starts + first_row + row, mask=inside, other=0)
    count = tl.load(query_starts + first_row + row + 1, mask=inside, other=0) - begin
    context = tl.load(context_lengths + first_row + row, mask=inside & (count > 0), other=0)
    blocks = (context + SIZE - 1) // SIZE
    parts = blocks
    if TILE > 0:
        parts = tl.where(context > 0, (count + TILE - 1) // TILE, 0)
    ends = tl.cumsum(parts, 0)
    item = tl.program_id(0)
    found = tl.sum((ends <= item).to(tl.int32), 0)
    own = row == found
    last = tl.sum(tl.where(own, ends, 0), 0) - 1
    return found, last - item, tl.sum(tl.where(row < found, blocks, 0), 0)


@triton.jit(do_not_specialize=["first_row", "rows", "table_stride"])
def _gather_kernel(
    cache,
    gathered,
    query_starts,
    context_lengths,
    block_tables,
    table_rows,
    scales,
    first_row,
    rows,
    table_stride,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    INDIRECT: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Grid (blocks of all rows,): the latents of the rows one after the other, each filled up to whole blocks.

    With SCALED they are fp8 in the cache, and each column has a scale.
    """
    found, back, first_block = _find_row(query_starts, context_lengths, first_row, rows, 0, ROWS_BLOCK, BLOCK_SIZE)
    if found >= rows:
        return
    row = first_row + found
    context = tl.load(context_lengths + row)
    block = tl.cdiv(context, BLOCK_SIZE) - 1 - back
    line = row
    if INDIRECT:
        line = tl.load(table_rows + row)
    stored = tl.load(block_tables + line.to(tl.int64) * table_stride + block).to(tl.int64)
    slot = tl.arange(0, BLOCK_SIZE)
    dims = tl.arange(0, WIDTH_BLOCK)
    present = (block * BLOCK_SIZE + slot < context)[:, None] & (dims < WIDTH)[None, :]
    source = cache + (stored * BLOCK_SIZE + slot[:, None]) * WIDTH + dims[None, :]
    # What lies behind a row's end may be anything, NaN too: it becomes zero.
    stored_values = tl.load(source, mask=present, other=0.0)
    if SCALED:
        stored_values = stored_values.to(tl.float32) * tl.load(scales + dims, mask=dims < WIDTH, other=1.0)[None, :]
    found_values = stored_values.to(gathered.dtype.element_ty)
    target = gathered + ((first_block + block).to(tl.int64) * BLOCK_SIZE + slot[:, None]) * WIDTH + dims[None, :]
    tl.store(target, found_values, mask=(dims < WIDTH)[None, :] & (slot >= 0)[:, None])


@triton.jit
def _attend_range(
    q,
    q_rope,
    keys,
    ropes,
    key_stride,
    rope_stride,
    begin,
    end,
    visible,
    best,
    total,
    sums,
    scale,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    ROPE: tl.constexpr,
    TILE_N: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Keys ``begin .. end-1``; with MASKED each query sees the first ``visible`` of all."""
    nope, value, rope = tl.arange(0, NOPE), NOPE + tl.arange(0, VALUE), tl.arange(0, ROPE)
    for first in tl.range(begin, end, TILE_N, num_stages=STAGES):
        place = first + tl.arange(0, TILE_N)
        line = keys + place[:, None] * key_stride
        rope_line = ropes + place[:, None] * rope_stride
        if MASKED:
            present = (place < end)[:, None]
            k = tl.load(line + nope[None, :], mask=present, other=0.0)
            k_rope = tl.load(rope_line + rope[None, :], mask=present, other=0.0)
            v = tl.load(line + value[None, :], mask=present, other=0.0)
        else:
            k = tl.load(line + nope[None, :])
            k_rope = tl.load(rope_line + rope[None, :])
            v = tl.load(line + value[None, :])
        scores = tl.dot(q, tl.trans(k))
        scores = tl.dot(q_rope, tl.trans(k_rope), scores)
        if MASKED:
            scores = tl.where(place[None, :] < visible[:, None], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None])
        best = higher
    return best, total, sums


@triton.jit(do_not_specialize=["first_row", "rows"])
def _attend_kernel(
    queries,
    expanded,
    gathered,
    output,
    query_starts,
    context_lengths,
    query_stride,
    first_row,
    rows,
    scale,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (tiles of all rows' queries, heads): a row's last tile, which has the most keys, comes first."""
    found, tile, first_block = _find_row(query_starts, context_lengths, first_row, rows, TILE_M, ROWS_BLOCK, BLOCK_SIZE)
    if found >= rows:
        return
    head, row = tl.program_id(1), first_row + found
    start = tl.load(query_starts + row)
    count = tl.load(query_starts + row + 1) - start
    context = tl.load(context_lengths + row)
    token = tile * TILE_M + tl.arange(0, TILE_M)
    is_query = (token < count)[:, None]
    query = queries + (start + token).to(tl.int64)[:, None] * query_stride + head * (NOPE + ROPE)
    q = tl.load(query + tl.arange(0, NOPE)[None, :], mask=is_query, other=0.0)
    q_rope = tl.load(query + NOPE + tl.arange(0, ROPE)[None, :], mask=is_query, other=0.0)
    first_key = first_block.to(tl.int64) * BLOCK_SIZE
    keys = expanded + first_key * (HEADS * (NOPE + VALUE)) + head * (NOPE + VALUE)
    ropes = gathered + first_key * (RANK + ROPE) + RANK
    best = tl.full((TILE_M,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_M,), tl.float32)
    sums = tl.zeros((TILE_M, VALUE), tl.float32)
    # Keys that all queries of the tile see, in whole tiles, and those up to what its last query sees.
    seen = context - count + tile * TILE_M
    whole = (seen + 1) // TILE_N * TILE_N
    end = tl.minimum(context, seen + TILE_M)
    visible = context - count + token + 1
    best, total, sums = _attend_range(
        q,
        q_rope,
        keys,
        ropes,
        HEADS * (NOPE + VALUE),
        RANK + ROPE,
        0,
        whole,
        visible,
        best,
        total,
        sums,
        scale,
        NOPE,
        VALUE,
        ROPE,
        TILE_N,
        False,
        STAGES,
    )
    best, total, sums = _attend_range(
        q,
        q_rope,
        keys,
        ropes,
        HEADS * (NOPE + VALUE),
        RANK + ROPE,
        whole,
        end,
        visible,
        best,
        total,
        sums,
        scale,
        NOPE,
        VALUE,
        ROPE,
        TILE_N,
        True,
        STAGES,
    )
    target = output + ((start + token).to(tl.int64)[:, None] * HEADS + head) * VALUE + tl.arange(0, VALUE)[None, :]
    tl.store(target, (sums / total[:, None]).to(output.dtype.element_ty), mask=is_query)


_gather = Launcher(_gather_kernel)
_attend = Launcher(_attend_kernel)


def fits(shape: LatentQueries) -> bool:
    """Whether the kernels take these widths."""
    return all(width in (16, 32, 64, 128) for width in (shape.up.nope, shape.up.value, shape.rope))


def attend_prompts(
    queries: torch.Tensor,
    shape: LatentQueries,
    cache: torch.Tensor,
    batch: AttentionBatch,
    first_row: int,
    blocks: int,
    output: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """Attention of the rows from ``first_row`` on, whose contexts take ``blocks`` cache blocks at most.

    ``queries`` is (T, heads, nope + rope), turned already, as the latents in the cache are; the rows' lines of
    ``output``, (T, heads, value), are written. ``scales`` are those of the cache's columns, where it is fp8.
    """
    up, rank, rope = shape.up, shape.rank, shape.rope
    assert up.stacked is not None
    rows, size = batch.context_lengths.shape[0] - first_row, cache.shape[1]
    rows_block = 32
    while rows_block < rows:
        rows_block *= 4
    gathered = torch.empty((blocks * size, rank + rope), dtype=queries.dtype, device=queries.device)
    table_rows = batch.context_lengths if batch.table_rows is None else batch.table_rows
    _gather(
        (blocks, 1, 1),
        (
            cache,
            gathered,
            batch.query_starts,
            batch.context_lengths,
            batch.block_tables,
            table_rows,
            gathered if scales is None else scales,
        ),
        fixed=(),
        free=(first_row, rows, batch.block_tables.stride(0)),
        constants=(
            rank + rope,
            triton.next_power_of_2(rank + rope),
            size,
            rows_block,
            batch.table_rows is not None,
            scales is not None,
        ),
    )
    expanded = gathered[:, :rank] @ up.stacked.view(-1, rank).t()
    tiles = triton.cdiv(queries.shape[0] - first_row, TILE_M) + rows
    _attend(
        (tiles, up.heads, 1),
        (queries, expanded, gathered, output, batch.query_starts, batch.context_lengths),
        fixed=(queries.stride(0),),
        free=(first_row, rows, shape.scale * LOG2_E),
        constants=(up.heads, up.nope, up.value, rank, rope, size, rows_block, TILE_M, TILE_N, STAGES),
        warps=WARPS,
        stages=STAGES,
    )
