"""Paged attention of any type and width: one kernel for decode rows, prefill chunks and MLA, and one that combines a
row's splits. ``decode_attention`` and ``prefill_attention`` are faster where they fit.

A tile's M rows are (query token, query head) pairs that share one key/value head, token by token: a decode fills it
with the heads of its group, a prefill chunk with tokens too, and no combination of counts wastes more than one tile.
Lengths and block tables are read on the device; programs that have nothing to do leave at once.

A decode row's keys are cut into at most ``MAX_SPLITS`` parts for programs of their own, by a rule that knows the
row's own length only, so that its sums are taken in the same order whatever else is in the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engines.kernels.cuda.launch import Launcher
from engines.kernels.reference import AttentionBatch

MAX_SPLITS = 16
SPLIT_TOKENS = 256
"""Fewest keys of a split: a shorter row is not cut."""
WIDEST_HEAD = 256
WIDEST_LATENT = 512
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class _Tile:
    rows: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _split_size(context, MAX_SPLITS: tl.constexpr, SPLIT_TOKENS: tl.constexpr):
    """Keys in each split of a row, whole tiles of any size."""
    even = tl.cdiv(tl.cdiv(context, MAX_SPLITS), 128) * 128
    return tl.maximum(even, SPLIT_TOKENS)


@triton.jit(do_not_specialize=["first_row", "splits", "table_stride"])
def _attention_kernel(
    queries,
    keys,
    values,
    output,
    partials,
    partial_logs,
    query_starts,
    context_lengths,
    block_tables,
    table_rows,
    query_token_stride,
    query_head_stride,
    key_slot_stride,
    key_head_stride,
    value_slot_stride,
    value_head_stride,
    heads,
    first_row,
    splits,
    table_stride,
    scale,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
):
    """Grid (tiles * splits, kv heads, rows). The key's first VALUE_DIM entries and its rest are multiplied apart."""
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    kv_head, index = tl.program_id(1), tl.program_id(2)
    row = first_row + index
    start = tl.load(query_starts + row)
    count = tl.load(query_starts + row + 1) - start
    context = tl.load(context_lengths + row)
    if tile * TILE_M >= count * GROUP:
        return
    # The first key that no query of the tile may see.
    last = tl.minimum(context, context - count + (tile * TILE_M + TILE_M - 1) // GROUP + 1)
    begin, end = 0, last
    if SPLIT:
        size = _split_size(context, MAX_SPLITS, SPLIT_TOKENS)
        begin = split * size
        end = tl.minimum(last, begin + size)
        if begin >= end:
            return

    pairs = tile * TILE_M + tl.arange(0, TILE_M)
    token, head = pairs // GROUP, kv_head * GROUP + pairs % GROUP
    is_query = (token < count)[:, None]
    position = context - count + token
    dims = tl.arange(0, VALUE_BLOCK)
    is_dim = dims < VALUE_DIM
    query = queries + (start + token).to(tl.int64)[:, None] * query_token_stride + head[:, None] * query_head_stride
    q = tl.load(query + dims[None, :], mask=is_query & is_dim[None, :], other=0.0)
    if REST_BLOCK > 0:
        rest = VALUE_DIM + tl.arange(0, REST_BLOCK)
        is_rest = rest < KEY_DIM
        q_rest = tl.load(query + rest[None, :], mask=is_query & is_rest[None, :], other=0.0)

    best = tl.full((TILE_M,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_M,), tl.float32)
    sums = tl.zeros((TILE_M, VALUE_BLOCK), tl.float32)
    line = tl.load(table_rows + row) if TABLE_ROWS else row
    table = block_tables + line.to(tl.int64) * table_stride
    for first in range(begin, end, TILE_N):
        place = first + tl.arange(0, TILE_N)
        present = place < end
        block = tl.load(table + place // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
        slot = block * BLOCK_SIZE + place % BLOCK_SIZE
        # What lies behind a row's end may be anything, NaN too: it is never loaded.
        key = keys + slot * key_slot_stride + kv_head * key_head_stride
        k = tl.load(key[:, None] + dims[None, :], mask=present[:, None] & is_dim[None, :], other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if REST_BLOCK > 0:
            k_rest = tl.load(key[:, None] + rest[None, :], mask=present[:, None] & is_rest[None, :], other=0.0)
            scores = tl.dot(q_rest, tl.trans(k_rest.to(q.dtype)), scores, input_precision="ieee")
        visible = present[None, :] & (place[None, :] <= position[:, None])
        scores = tl.where(visible, scores * scale, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(weights, 1)
        if SHARED:
            v = k
        else:
            value = values + slot * value_slot_stride + kv_head * value_head_stride
            v = tl.load(value[:, None] + dims[None, :], mask=present[:, None] & is_dim[None, :], other=0.0).to(q.dtype)
        sums = tl.dot(weights.to(q.dtype), v, sums * shrink[:, None], input_precision="ieee")
        best = higher

    result = sums / total[:, None]
    mask = is_query & is_dim[None, :]
    if SPLIT and splits > 1:
        entry = (index.to(tl.int64) * splits + split) * heads + head
        tl.store(partials + entry[:, None] * VALUE_DIM + dims[None, :], result, mask=mask)
        tl.store(partial_logs + entry, best + tl.log2(total), mask=token < count)
    else:
        place_out = (start + token).to(tl.int64) * heads + head
        tl.store(output + place_out[:, None] * VALUE_DIM + dims[None, :], result.to(q.dtype), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def _combine_kernel(
    partials,
    partial_logs,
    output,
    context_lengths,
    heads,
    splits,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
):
    """Grid (rows, heads)."""
    row, head = tl.program_id(0), tl.program_id(1)
    context = tl.load(context_lengths + row)
    used = tl.cdiv(context, _split_size(context, MAX_SPLITS, SPLIT_TOKENS))
    split = tl.arange(0, MAX_SPLITS)
    entry = (row.to(tl.int64) * splits + split) * heads + head
    logs = tl.load(partial_logs + entry, mask=split < used, other=float("-inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))
    weights = weights / tl.sum(weights, 0)
    dims = tl.arange(0, VALUE_BLOCK)
    mask = (split < used)[:, None] & (dims < VALUE_DIM)[None, :]
    parts = tl.load(partials + entry[:, None] * VALUE_DIM + dims[None, :], mask=mask, other=0.0)
    result = tl.sum(parts * weights[:, None], 0)
    place = row.to(tl.int64) * heads + head
    tl.store(output + place * VALUE_DIM + dims, result.to(output.dtype.element_ty), mask=dims < VALUE_DIM)


_attend = Launcher(_attention_kernel)
_combine = Launcher(_combine_kernel)


def fits(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the kernel takes these widths: keys as wide as values, or values that are the keys' first entries."""
    if _shared(keys, values):
        return values.shape[-1] <= WIDEST_LATENT and keys.shape[-1] - values.shape[-1] <= WIDEST_HEAD
    return keys.shape[-1] == values.shape[-1] <= WIDEST_HEAD


def attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: AttentionBatch, scale: float
) -> torch.Tensor:
    """As ``reference.attention``: (T, Hq, D) -> (T, Hq, Dv). Scratch is bounded by rows, heads and ``MAX_SPLITS``."""
    heads, rows, decodes = queries.shape[1], batch.context_lengths.shape[0], batch.decode_rows or 0
    output = queries.new_empty(queries.shape[0], heads, values.shape[-1])
    if decodes:
        splits = min(MAX_SPLITS, -(-batch.longest_context // SPLIT_TOKENS))
        partials = logs = output
        if splits > 1:
            partials = output.new_empty((decodes, MAX_SPLITS, heads, values.shape[-1]), dtype=torch.float32)
            logs = output.new_empty((decodes, MAX_SPLITS, heads), dtype=torch.float32)
        _launch(queries, keys, values, output, (partials, logs), batch, scale, range(decodes), splits)
        if splits > 1:
            _combine(
                (decodes, heads, 1),
                (partials, logs, output, batch.context_lengths),
                fixed=(heads,),
                free=(splits,),
                constants=(values.shape[-1], _block(values.shape[-1]), MAX_SPLITS, SPLIT_TOKENS),
            )
    if rows > decodes:
        _launch(queries, keys, values, output, (output, output), batch, scale, range(decodes, rows), 0)
    return output


def _launch(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor],
    batch: AttentionBatch,
    scale: float,
    rows: range,
    splits: int,
) -> None:
    """``splits`` is 0 for prefill rows."""
    heads, kv_heads, value_dim = queries.shape[1], keys.shape[2], values.shape[-1]
    rest = keys.shape[-1] - value_dim
    tile = _choose_tile(queries.dtype, value_dim, prefill=splits == 0)
    longest = batch.longest_query if splits == 0 else 1
    tables, lines = batch.block_tables, batch.table_rows
    tiles = -(-longest * (heads // kv_heads) // tile.rows)
    _attend(
        (tiles * max(splits, 1), kv_heads, len(rows)),
        (
            queries,
            keys,
            values,
            output,
            *scratch,
            batch.query_starts,
            batch.context_lengths,
            tables,
            tables if lines is None else lines,
        ),
        fixed=(*queries.stride()[:2], *keys.stride()[1:3], *values.stride()[1:3], heads),
        free=(rows.start, max(splits, 1), tables.stride(0), scale * LOG2_E),
        constants=(
            heads // kv_heads,
            keys.shape[1],
            keys.shape[3],
            value_dim,
            _block(value_dim),
            _block(rest) if rest else 0,
            _shared(keys, values),
            splits > 0,
            MAX_SPLITS,
            SPLIT_TOKENS,
            tile.rows,
            tile.keys,
            lines is not None,
        ),
        warps=tile.warps,
        stages=tile.stages,
    )


def _choose_tile(dtype: torch.dtype, value_dim: int, prefill: bool) -> _Tile:
    """Sizes whose operands fit in shared memory and whose sums fit in registers."""
    if dtype is torch.float32:
        return _Tile(16, 16, 4, 1) if value_dim > 128 else _Tile(32 if prefill else 16, 32, 8, 2)
    if value_dim > WIDEST_HEAD:
        return _Tile(32 if prefill else 16, 32, 8 if prefill else 4, 2)
    if prefill:
        return _Tile(128, 64, 8, 3) if value_dim <= 128 else _Tile(64, 32, 8, 2)
    return _Tile(16, 64, 4, 3) if value_dim <= 128 else _Tile(16, 32, 4, 2)


def _shared(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether a value is the beginning of its key."""
    return keys.data_ptr() == values.data_ptr() and keys.stride() == values.stride()


def _block(width: int) -> int:
    """A tile's extent for ``width``: a power of two that the matrix units take."""
    return max(16, 1 << (width - 1).bit_length())
