"""Attention of rows with one new token: one kernel from the raw queries, keys and values to the attended values.

A program owns one row, one key/value head and every ``splits``-th tile of its cached keys, for all query heads of
the group at once. The row's new key and value come from the linear layer's output: they are normed, rotated, attended
to and written to the cache by the row's first split. The split that finishes last puts the row together, so there is
no second launch; the counters by which it knows that it is the last are zero again when it ends.

Lengths are read on the device and a row's own length decides how many of its programs have anything to do: a captured
graph serves any context up to its bound. While one program works on a tile, its next one is on the way to registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton

from engines.kernels.cuda.attention import LOG2_E
from engines.kernels.cuda.decode_kernel import decode_kernel
from engines.kernels.cuda.device import machine_at, processors, starts_early
from engines.kernels.cuda.launch import Launcher
from engines.kernels.cuda.scratch import counters
from engines.kernels.reference import AttentionBatch

if TYPE_CHECKING:
    from engines.kernels.attention import GroupedQueries

MAX_SPLITS = 64
PROGRAMS_PER_PROCESSOR = 2
"""As many are resident at once, by the registers that their tiles in flight take."""
FP8_STAGES = 4
COMBINED = 16
"""Splits whose sums are loaded at once when a row is put together."""
EARLY_ROWS = 32
"""Up to so many rows the fused kernel is launched before the former one ends. Of more, its programs would hold the room
that the former one's own programs wait for."""


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Cached keys that a program works on at once, and its warps."""

    keys: int
    warps: int
    stages: int = 0
    """Tiles on their way at once through shared memory; 0: the next one, through registers."""


STAGED = DecodeTile(64, 4, stages=2)
PROGRAM_SHARED = 8 << 10
"""Bytes that a program takes beside its tiles."""

_decode = Launcher(decode_kernel)


def choose_splits(rows: int, kv_heads: int, longest_context: int, resident: int, tile_keys: int) -> int:
    """So many that ``resident`` programs find work, and none has less than a tile of the longest row."""
    return max(1, min(resident // (rows * kv_heads), -(-longest_context // tile_keys), MAX_SPLITS))


def choose_tile(head_dim: int, pairs: int, processors: int, shared_memory: int, itemsize: int) -> DecodeTile:
    """Tiles whose keys and values, twice, fit in registers; ``pairs`` are rows times key/value heads.

    Where there are more pairs than such programs fit on the device, tiles wait in shared memory, of which a
    multiprocessor has ``shared_memory`` bytes, if that is enough; else programs are small and all resident at once.
    """
    if head_dim > 128:
        return DecodeTile(32, 4)
    if pairs <= PROGRAMS_PER_PROCESSOR * processors:
        return DecodeTile(64, 4)
    staged = STAGED.stages * 2 * STAGED.keys * triton.next_power_of_2(head_dim) * itemsize
    return STAGED if PROGRAMS_PER_PROCESSOR * (staged + PROGRAM_SHARED) <= shared_memory else DecodeTile(32, 2)


def choose_fp8_tile(head_dim: int, pairs: int, processors: int, queries: int) -> DecodeTile:
    """The same over an fp8 cache, whose tiles wait in shared memory; ``queries`` are the lines of a tile of queries.

    A thread brings no more than 16 numbers of the new token into fp8: with 32 of them Triton 3.6's assembler crashes.
    """
    warps = max(4, queries * triton.next_power_of_2(head_dim) // 512)
    return DecodeTile(32 if pairs > PROGRAMS_PER_PROCESSOR * processors else 64, warps, FP8_STAGES)


def attend_fused(
    qkv: torch.Tensor,
    shape: GroupedQueries,
    cache: tuple[torch.Tensor, ...],
    batch: AttentionBatch,
    tile: DecodeTile | None = None,
    splits: int | None = None,
    early: bool = True,
) -> torch.Tensor:
    """``grouped_query_attention`` where every row has one token: (R, (Hq + 2 Hk) * D) -> (R, Hq * D).

    Padding rows, of context 0, are neither computed nor written. ``tile`` and ``splits`` are chosen if not given. With
    ``early`` the kernel may start before the former one ends, where the device can.
    """
    early = early and starts_early(qkv.device)
    output = torch.empty((qkv.shape[0], shape.heads * shape.head_dim), dtype=qkv.dtype, device=qkv.device)
    call = _Call(qkv, qkv.stride(0), shape.head_dim, shape.heads, cache, batch, shape.scale, early)
    _launch(call, output, batch.context_lengths.shape[0], tile, splits, shape)
    return output


def attend_single(
    queries: torch.Tensor,
    cache: tuple[torch.Tensor, ...],
    batch: AttentionBatch,
    scale: float,
    rows: int,
    output: torch.Tensor,
    early: bool = False,
) -> None:
    """Into ``output``, (T, Hq, D) as ``queries``: those of the first ``rows`` rows that have one token. Queries are
    rotated, this step's keys and values in the cache. With ``early`` the kernel runs beside the one before it, which
    must write nothing that this one reads.
    """
    call = _Call(queries, queries.stride(0), queries.stride(1), queries.shape[1], cache, batch, scale, early)
    _launch(call, output, rows)


@dataclass(frozen=True, slots=True)
class _Call:
    queries: torch.Tensor
    token_stride: int
    head_stride: int
    heads: int
    cache: tuple[torch.Tensor, ...]
    batch: AttentionBatch
    scale: float
    early: bool


def _launch(
    call: _Call,
    output: torch.Tensor,
    rows: int,
    tile: DecodeTile | None = None,
    splits: int | None = None,
    fused: GroupedQueries | None = None,
) -> None:
    queries, batch, (keys, values, *scales) = call.queries, call.batch, call.cache
    block_size, kv_heads, width = keys.shape[1:]
    group, device = call.heads // kv_heads, queries.device
    tile_m = max(16, triton.next_power_of_2(group))
    pairs, units = rows * kv_heads, processors(device)
    if tile is None:
        machine = machine_at(device)
        shared_memory = 0 if machine is None else machine.shared_memory
        if scales:
            tile = choose_fp8_tile(width, pairs, units, tile_m)
        else:
            tile = choose_tile(width, pairs, units, shared_memory, keys.element_size())
    resident = PROGRAMS_PER_PROCESSOR * units
    splits = splits or choose_splits(rows, kv_heads, batch.longest_context, resident, tile.keys)
    partials = logs = arrivals = output
    if splits > 1:
        partials = torch.empty((rows * kv_heads * splits * group, width), dtype=torch.float32, device=device)
        logs = torch.empty(rows * kv_heads * splits * group, dtype=torch.float32, device=device)
        arrivals = counters(device).arrivals
    cos_sin = query_gain = key_gain = output
    half, eps, normed = 0, 0.0, False
    if fused is not None:
        cos_sin, half = fused.cos_sin, fused.cos_sin.shape[1] // 2
        if fused.query_norm is not None and fused.key_norm is not None:
            query_gain, key_gain, eps, normed = fused.query_norm.weight, fused.key_norm.weight, fused.key_norm.eps, True
    tables, line = batch.block_tables, batch.table_rows
    ahead = rows <= EARLY_ROWS and call.early and fused is not None
    _decode(
        (splits, kv_heads, rows),
        (
            queries,
            keys,
            values,
            output,
            partials,
            logs,
            arrivals,
            batch.query_starts,
            batch.context_lengths,
            batch.cache_slots,
            tables,
            tables if line is None else line,
            cos_sin,
            query_gain,
            key_gain,
            scales[0] if scales else output,
        ),
        fixed=(call.token_stride, call.head_stride, *keys.stride()[1:3]),
        free=(splits, tables.stride(0), tables.shape[1] * block_size, call.scale * LOG2_E, eps),
        constants=(
            group,
            kv_heads,
            width,
            half,
            block_size,
            tile_m,
            tile.keys,
            triton.next_power_of_2(group),
            triton.next_power_of_2(width),
            COMBINED,
            fused is not None,
            normed,
            splits > 1,
            line is not None,
            call.early,
            bool(scales),
            tile.stages,
        ),
        warps=tile.warps,
        stages=1,
        early=ahead,
    )
