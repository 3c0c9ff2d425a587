"""Attention of rows with any number of new tokens: prompts, chunks of them, and steps that mix them with decodes.

A tile's M lines are (token, query head) pairs that share one key/value head, token by token, as in
``engines.kernels.cuda.attention``. The grid is a bound on the tiles that any division of the step's tokens over its
rows can have; each program finds its row on the device, so a captured graph serves every step of its size. The last
tiles of a row, which attend to most, are started first, programs that find no tile last. Keys that all queries of a
tile see are attended to without causal masks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from engines.kernels.cuda import decode_attention
from engines.kernels.cuda.attention import LOG2_E
from engines.kernels.cuda.device import processors, runs_gluon, starts_early
from engines.kernels.cuda.fp8 import as_float16, head_scales, row_sizes
from engines.kernels.cuda.launch import Launcher
from engines.kernels.reference import FP8, AttentionBatch

WIDEST_HEAD = 256
ROWS_AT_ONCE = 256
"""Rows among which a program looks for its own at once."""

HOPPER_TILES = 1.0
"""Tiles of 128 pairs for each processor from which on ``hopper_attention`` serves what it fits."""


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """Pairs and keys that a program multiplies at once, its warps, and tiles of keys on their way."""

    pairs: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _row_tiles(query_starts, row, rows, skip_single, GROUP: tl.constexpr, TILE_M: tl.constexpr):
    """Tiles of each row; none if it is behind the last, has no token, or has one where such rows are left out."""
    start = tl.load(query_starts + row, mask=row < rows, other=0)
    count = tl.load(query_starts + row + 1, mask=row < rows, other=0) - start
    return tl.where((count == 1) & (skip_single != 0), 0, tl.cdiv(count * GROUP, TILE_M))


@triton.jit
def _find_row(query_starts, first_row, rows, number, skip_single, GROUP, TILE_M, ROWS: tl.constexpr):
    """The row of the tile of this number, tiles before the row's, and tiles of all rows."""
    found, before, seen = first_row, 0, 0
    for first in range(first_row, rows, ROWS):
        tiles = _row_tiles(query_starts, first + tl.arange(0, ROWS), rows, skip_single, GROUP, TILE_M)
        earlier = seen + tl.cumsum(tiles, 0) <= number
        found += tl.sum(earlier.to(tl.int32), 0)
        before += tl.sum(tl.where(earlier, tiles, 0), 0)
        seen += tl.sum(tiles, 0)
    return found, before, seen


@triton.jit
def _softmax_step(scores, scale, best, total, sums, SCALED: tl.constexpr):
    """Weights of one more tile of scores, and the running softmax brought to its maximum.

    ``scale`` is one number, or one for each row if SCALED.
    """
    row_scale = scale
    if SCALED:
        row_scale = scale[:, None]
    higher = tl.maximum(best, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * row_scale - higher[:, None])
    shrink = tl.exp2(best - higher)
    return weights, higher, total * shrink + tl.sum(weights, 1), sums * shrink[:, None]


@triton.jit(do_not_specialize=["rows", "first_row", "table_stride", "skip_single"])
def _prefill_kernel(
    queries,
    keys,
    values,
    output,
    query_starts,
    context_lengths,
    block_tables,
    table_rows,
    scales,
    token_stride,
    head_stride,
    slot_stride,
    cache_head_stride,
    rows,
    first_row,
    table_stride,
    skip_single,
    scale,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    LET_START: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Grid (tiles * kv heads,). With LET_START the next kernel in the stream may start while this one runs.

    With SCALED keys and values are fp8, and ``scales`` has one for each key head, then one for each value head.
    """
    if LET_START:
        tl_cuda.gdc_launch_dependents()
    kv_head, number = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    row, before, total = _find_row(query_starts, first_row, rows, number, skip_single, GROUP, TILE_M, ROWS_AT_ONCE)
    if number >= total:
        return
    start = tl.load(query_starts + row)
    count = tl.load(query_starts + row + 1) - start
    # The heaviest of a row first.
    tile = tl.cdiv(count * GROUP, TILE_M) - 1 - (number - before)
    context = tl.load(context_lengths + row)
    line = row
    if TABLE_ROWS:
        line = tl.load(table_rows + row)
    table = block_tables + line.to(tl.int64) * table_stride
    earlier = context - count
    pairs = tile * TILE_M + tl.arange(0, TILE_M)
    token, head = pairs // GROUP, kv_head * GROUP + pairs % GROUP
    # The last key that each query sees: its own; for lines behind the row's last token, the last of all.
    last = tl.minimum(earlier + token, context - 1)
    # Keys that every query of the tile sees, in whole tiles, and those that any sees.
    common = (earlier + tile * TILE_M // GROUP + 1) // TILE_N * TILE_N
    end = tl.minimum(context, earlier + (tile * TILE_M + TILE_M - 1) // GROUP + 1)

    dims = tl.arange(0, DIM_BLOCK)
    is_dim = dims < DIM
    pair_mask = (token < count)[:, None] & is_dim[None, :]
    own = (start + token).to(tl.int64)
    source = queries + own[:, None] * token_stride + head[:, None] * head_stride
    q = tl.load(source + dims[None, :], mask=pair_mask, other=0.0)
    keys += kv_head * cache_head_stride
    values += kv_head * cache_head_stride
    lane = tl.arange(0, TILE_N)
    key_scale, value_scale = head_scales(scales, kv_head, KV_HEADS, SCALED)
    if SCALED:
        sizes = row_sizes(q)
        q, scale = as_float16(q, sizes), scale * key_scale * sizes

    best = tl.full((TILE_M,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_M,), tl.float32)
    sums = tl.zeros((TILE_M, DIM_BLOCK), tl.float32)
    for first in range(0, end, TILE_N):
        place = first + lane
        present = place < end
        slot = tl.load(table + place // BLOCK_SIZE, mask=present, other=0).to(tl.int64) * BLOCK_SIZE
        entry = ((slot + lane % BLOCK_SIZE) * slot_stride)[:, None] + dims[None, :]
        # What lies behind a row's end may be anything, NaN too: it is never loaded.
        mask = present[:, None] & is_dim[None, :]
        k = tl.load(keys + entry, mask=mask, other=0.0)
        v = tl.load(values + entry, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)))
        if first >= common:
            scores = tl.where(place[None, :] <= last[:, None], scores, float("-inf"))
        weights, best, total, sums = _softmax_step(scores, scale, best, total, sums, SCALED)
        sums = tl.dot(weights.to(q.dtype), v.to(q.dtype), sums)

    result = sums / total[:, None] * value_scale
    target = output + (own * (KV_HEADS * GROUP) + head)[:, None] * DIM + dims[None, :]
    tl.store(target, result.to(output.dtype.element_ty), mask=pair_mask)


_prefill = Launcher(_prefill_kernel)


def fits(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether this file's kernels and those of ``decode_attention`` take these types and widths."""
    half_width = queries.dtype in (torch.bfloat16, torch.float16)
    half_width = half_width and keys.dtype == values.dtype and keys.dtype in (queries.dtype, FP8)
    width, block_size = keys.shape[3], keys.shape[1]
    blocks = keys.stride() == values.stride() and keys.is_contiguous() and block_size & (block_size - 1) == 0
    return half_width and blocks and keys.shape == values.shape and width <= WIDEST_HEAD and width % 8 == 0


def paged_attention(
    queries: torch.Tensor, cache: tuple[torch.Tensor, ...], batch: AttentionBatch, scale: float
) -> torch.Tensor:
    """As ``engines.kernels.paged_attention``: (T, Hq, D) -> (T, Hq, D). Tokens of padding are not written.

    Rows of one token go to the decode kernel: the first ``decode_rows``, or where the host does not know which they
    are, those that the device finds.
    """
    output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    # Every row but padding has a token, and padding comes last.
    rows, known = min(batch.context_lengths.shape[0], queries.shape[0]), batch.decode_rows
    singles = rows if known is None else known
    chunked = (known is None or known < rows) and attend_chunks(queries, cache, batch, scale, output)
    if singles:
        # Both kernels read what stood in memory before the first: they may run side by side.
        early = chunked and starts_early(queries.device)
        decode_attention.attend_single(queries, cache, batch, scale, singles, output, early)
    return output


def choose_tile(head_dim: int, pairs: int, processors: int, fp8: bool) -> PrefillTile:
    """Large tiles, unless they would leave processors without work; ``pairs`` are those of all key/value heads.

    Over an ``fp8`` cache some are smaller, so that keys and values fit in registers in float16 too.
    """
    if head_dim > 128:
        return PrefillTile(64 if fp8 else 128, 32, 8, 3)
    if fp8 and pairs < 128 * processors:
        return PrefillTile(64, 64, 4, 4)
    return PrefillTile(128, 64, 8, 5) if pairs >= 128 * processors else PrefillTile(64, 128, 4, 3)


@functools.cache
def _hopper_kernel(device: torch.device) -> ModuleType | None:
    """The faster kernel's file, where this device and this Triton run it."""
    if not runs_gluon(device):
        return None
    from engines.kernels.cuda import hopper_attention

    return hopper_attention


def _faster_kernel(queries: torch.Tensor, keys: torch.Tensor, rows: int, tokens: int) -> ModuleType | None:
    """The same, where it also fits, and so many tokens of so many rows give all processors work."""
    if tokens * queries.shape[1] < HOPPER_TILES * 128 * processors(queries.device):
        return None
    kernel = _hopper_kernel(queries.device)
    return kernel if kernel is not None and kernel.fits(queries, keys, rows) else None


def attend_chunks(
    queries: torch.Tensor,
    cache: tuple[torch.Tensor, ...],
    batch: AttentionBatch,
    scale: float,
    output: torch.Tensor,
    tile: PrefillTile | None = None,
) -> bool:
    """Into ``output``: the rows from ``decode_rows`` on, or where that is None those that have not one token.

    Returns whether a kernel was launched: with no more than one token there can be no such row.
    """
    keys, values, *scales = cache
    block_size, kv_heads, width = keys.shape[1:]
    rows, first_row = min(batch.context_lengths.shape[0], queries.shape[0]), batch.decode_rows or 0
    group, tokens = queries.shape[1] // kv_heads, queries.shape[0] - first_row
    known = batch.decode_rows is not None
    # A row that is not known to have more than one token has at least two.
    most = min(rows - first_row, tokens if known else tokens // 2)
    if not most:
        return False
    if tile is None and (kernel := _faster_kernel(queries, keys, rows - first_row, tokens)) is not None:
        kernel.attend_chunks(queries, cache, batch, scale, output, tokens * group // kernel.LINES + most)
        return True
    tile = tile or choose_tile(width, tokens * queries.shape[1], processors(queries.device), bool(scales))
    # A broken tile for each row.
    tiles = tokens * group // tile.pairs + most
    tables, line = batch.block_tables, batch.table_rows
    _prefill(
        (tiles * kv_heads, 1, 1),
        (
            queries,
            keys,
            values,
            output,
            batch.query_starts,
            batch.context_lengths,
            tables,
            tables if line is None else line,
            scales[0] if scales else output,
        ),
        fixed=(*queries.stride()[:2], *keys.stride()[1:3]),
        free=(rows, first_row, tables.stride(0), int(not known), scale * LOG2_E),
        constants=(
            group,
            kv_heads,
            width,
            block_size,
            tile.pairs,
            tile.keys,
            triton.next_power_of_2(width),
            ROWS_AT_ONCE,
            line is not None,
            starts_early(queries.device),
            bool(scales),
        ),
        warps=tile.warps,
        stages=tile.stages,
    )
    return True
