"""Multi-head latent attention of decodes in the absorbed form: three launches between two linear layers.

``prepare`` brings the queries into the latent space and writes the step's latents, normed and turned, into the
cache. ``attend`` cuts each row's keys into parts for programs of their own; all heads share a tile of them, which
serves as keys and, but for its rope columns, as values. ``expand`` joins the parts and multiplies with the values'
weights. What a part or a tile is depends on the row's own length and on how many rows the step may have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from engines.kernels.cuda.attention import LOG2_E
from engines.kernels.cuda.device import runs_gluon, starts_early
from engines.kernels.cuda.launch import Launcher
from engines.kernels.cuda.mla_kernels import attend_kernel, expand_kernel, expand_one_kernel
from engines.kernels.cuda.mla_prefill import attend_prompts
from engines.kernels.cuda.mla_prepare import prepare_kernel
from engines.kernels.reference import AttentionBatch

if TYPE_CHECKING:
    from engines.kernels.latent_attention import LatentQueries

PROGRAMS = 132
"""So many attend at once: the multiprocessors of a Hopper GPU, each of which holds one."""
MAX_SPLITS = 32
ATTEND_WARPS, ATTEND_STAGES = 4, 2
TILE_KEYS = 64
WIDEST_HEAD = 256
FEW_TOKENS = 8
"""Up to so many tokens are expanded one by one: they have many parts each, and tiles of tokens few programs."""
VALUES_ALONE = 32
"""Of a head in one program, where tokens are expanded one by one."""
TILE_VALUES, EXPAND_WARPS = 64, 8
"""The same where they are expanded 16 at a time."""
FEWEST_SPLITS = 16
ON_HOPPER = False
"""Whether ``hopper_mla`` attends where it can."""

_prepare = Launcher(prepare_kernel)
_attend = Launcher(attend_kernel)
_expand_one = Launcher(expand_one_kernel)
_expand = Launcher(expand_kernel)
_block = triton.next_power_of_2


def fits(shape: LatentQueries) -> bool:
    """Whether the kernels take these widths."""
    heads_fit = shape.up.nope <= WIDEST_HEAD and shape.up.nope % 2 == 0
    return heads_fit and shape.rank in (64, 128, 256, 512) and shape.rope in (16, 32, 64, 128)


def attend_latents(
    queries: torch.Tensor,
    latents: torch.Tensor,
    shape: LatentQueries,
    cache: torch.Tensor,
    batch: AttentionBatch,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """``kernels.latent_attention`` of rows that have one query each. Padding rows' lines are undefined.

    ``scales`` are those of the cache's columns, where it is fp8: (rank + rope,) float32, one for the latent's and one
    for the rope part's.
    """
    early, rows = starts_early(queries.device), batch.context_lengths.shape[0]
    absorbed = prepare(queries, latents, shape, cache, batch, rows, early, scales)
    output = torch.empty((queries.shape[0], shape.up.heads, shape.up.value), dtype=queries.dtype, device=queries.device)
    attend_decodes(absorbed, shape, cache, batch, rows, output, early, scales)
    return output.view(queries.shape[0], -1)


def attend_mixed(
    queries: torch.Tensor,
    latents: torch.Tensor,
    shape: LatentQueries,
    cache: torch.Tensor,
    batch: AttentionBatch,
    decodes: int,
    blocks: int,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same where only the first ``decodes`` rows have one query; the others take ``blocks`` cache blocks.

    Queries are turned in place.
    """
    absorbed = prepare(queries, latents, shape, cache, batch, decodes, False, scales)
    output = torch.empty((queries.shape[0], shape.up.heads, shape.up.value), dtype=queries.dtype, device=queries.device)
    if decodes:
        attend_decodes(absorbed, shape, cache, batch, decodes, output, False, scales)
    attend_prompts(queries, shape, cache, batch, decodes, blocks, output, scales)
    return output.view(queries.shape[0], -1)


def write_latents(
    queries: torch.Tensor,
    latents: torch.Tensor,
    shape: LatentQueries,
    cache: torch.Tensor,
    batch: AttentionBatch,
    scales: torch.Tensor | None = None,
) -> None:
    """Norm, rope and cache write of the latents, nothing else. Queries are turned in place."""
    prepare(queries, latents, shape, cache, batch, 0, False, scales)


def prepare_tile(decodes: int) -> tuple[int, int]:
    """Tokens and columns of the rank in a program's tile."""
    return 16, 64 if decodes <= 16 else 128


def prepare(
    queries: torch.Tensor,
    latents: torch.Tensor,
    shape: LatentQueries,
    cache: torch.Tensor,
    batch: AttentionBatch,
    decodes: int,
    early: bool,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """(T, heads, nope + rope) raw queries -> (decodes, heads, rank + rope): the first tokens' absorbed and turned ones.

    The queries of the others are turned in place. ``latents`` is (T, rank + rope), raw too; they go normed and turned
    into ``cache``, (blocks, block_size, rank + rope).
    """
    (tokens, heads, _), up = queries.shape, shape.up
    assert up.stacked is not None
    rank, half = shape.rank, shape.rope // 2
    absorbed = torch.empty((decodes, heads, rank + 2 * half), dtype=queries.dtype, device=queries.device)
    tile_t, tile_c = prepare_tile(decodes)
    programs = tokens + heads * triton.cdiv(rank, tile_c) * triton.cdiv(decodes, tile_t)
    _prepare(
        (programs, 1, 1),
        (
            queries,
            latents,
            up.stacked,
            shape.latent_gain,
            batch.positions,
            shape.cos_sin,
            batch.cache_slots,
            cache,
            shape.cos_sin if scales is None else scales,
            absorbed,
        ),
        fixed=(queries.stride(0), latents.stride(0)),
        free=(tokens, decodes, shape.latent_eps),
        constants=(
            heads,
            _block(heads),
            up.nope,
            max(16, _block(up.nope)),
            up.value,
            rank,
            _block(rank),
            half,
            _block(half),
            shape.interleaved,
            tile_t,
            tile_c,
            early,
            scales is not None,
        ),
        early=early,
    )
    return absorbed


def splits_for(rows: int, longest_context: int) -> int:
    """Parts of a row's keys: as many programs as run at once, none for less than a tile.

    Two where that leaves one and each program has a processor to itself: half of the longest row is what counts then.
    """
    programs = PROGRAMS // rows
    return max(1, min(MAX_SPLITS, 2 if programs == 1 else programs, -(-longest_context // TILE_KEYS)))


def _attend_parts(
    absorbed: torch.Tensor,
    shape: LatentQueries,
    cache: torch.Tensor,
    batch: AttentionBatch,
    partials: torch.Tensor,
    logs: torch.Tensor,
    early: bool,
    scales: torch.Tensor | None,
) -> None:
    """Into ``partials``, (rows, splits, heads, rank), and, of several splits, ``logs``, (rows, splits, heads)."""
    (rows, splits, heads), device = logs.shape, absorbed.device
    if ON_HOPPER and scales is None and runs_gluon(device):
        from engines.kernels.cuda import hopper_mla

        if hopper_mla.fits(heads, shape.rank, shape.rope, cache):
            hopper_mla.attend_parts(absorbed, cache, partials, logs, batch, shape.scale, early)
            return
    table_rows = batch.context_lengths if batch.table_rows is None else batch.table_rows
    _attend(
        (splits, rows, triton.cdiv(heads, 16)),
        (
            absorbed,
            cache,
            partials,
            logs,
            batch.query_starts,
            batch.context_lengths,
            batch.block_tables,
            table_rows,
            logs if scales is None else scales,
        ),
        fixed=(),
        free=(splits, batch.block_tables.stride(0), shape.scale * LOG2_E),
        constants=(
            heads,
            16,
            shape.rank,
            _block(shape.rank),
            shape.rope,
            max(16, _block(shape.rope)),
            cache.shape[1],
            TILE_KEYS,
            batch.table_rows is not None,
            splits == 1,
            early,
            scales is not None,
        ),
        warps=ATTEND_WARPS,
        stages=ATTEND_STAGES,
        early=early,
    )


def attend_decodes(
    absorbed: torch.Tensor,
    shape: LatentQueries,
    cache: torch.Tensor,
    batch: AttentionBatch,
    rows: int,
    output: torch.Tensor,
    early: bool,
    scales: torch.Tensor | None = None,
) -> None:
    """Attention of the first ``rows`` rows, where they have one query: their lines of ``output``, (T, heads, value).

    Lines of padding rows, among those, are undefined.
    """
    heads = absorbed.shape[1]
    rank, nope, value = shape.rank, shape.up.nope, shape.up.value
    assert shape.up.stacked is not None
    splits = splits_for(rows, batch.longest_context)
    # Where nothing is left to join, a batched product of cuBLAS takes a fifth of the time of ``expand``.
    whole = splits == 1
    partials = absorbed.new_empty((rows, splits, heads, rank), dtype=absorbed.dtype if whole else torch.float32)
    logs = torch.empty((rows, splits, heads), dtype=torch.float32, device=absorbed.device)
    _attend_parts(absorbed, shape, cache, batch, partials, logs, early, scales)
    if whole:
        values = shape.up.stacked[:, nope:].transpose(1, 2)
        torch.bmm(partials[:, 0].transpose(0, 1), values, out=output[:rows].transpose(0, 1))
        return
    sizes = (heads, nope, value, rank, _block(rank))
    tensors = (partials, logs, shape.up.stacked, batch.context_lengths, batch.query_starts, output)
    if rows <= FEW_TOKENS:
        grid = (triton.cdiv(value, VALUES_ALONE), heads, rows)
        alone = (*sizes, _block(splits), VALUES_ALONE, TILE_KEYS, early)
        _expand_one(grid, tensors, (), (splits,), alone, early=early)
        return
    grid = (triton.cdiv(value, TILE_VALUES), heads, triton.cdiv(rows, 16))
    # So many rows have no more parts than that: one kernel for all their numbers.
    constants = (*sizes, max(FEWEST_SPLITS, _block(splits)), TILE_VALUES, TILE_KEYS, 16, 3, early)
    _expand(grid, tensors, (), (splits, rows), constants, warps=EXPAND_WARPS, early=early)
