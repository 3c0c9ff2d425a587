"""Routed and shared experts: gate and up with SiLU, down, and the weighted sum, for few tokens and for many.

A pair is a token and one of its C experts, at ``token * C + column``. A program takes one expert's tile of pairs and
a tile of columns; it reads the weights of that tile once. Few tokens: each program finds its expert's pairs itself,
in the order of the tokens. Many: ``group_pairs`` writes them down by expert first. Shared experts are the stack's
last ones, which every token takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from engines.kernels.cuda.expert_tuning import Tiles
from engines.kernels.cuda.launch import Launcher
from engines.kernels.cuda.routing import Routed

if TYPE_CHECKING:
    from engines.kernels.experts import Stacks

COMBINE_BLOCK = 512


@triton.jit
def prefetch_shared(stack, FIRST: tl.constexpr, LENGTH: tl.constexpr, SEGMENT: tl.constexpr):
    """Ask the L2 cache for LENGTH 16-bit entries of the stack from FIRST on; the programs share them out."""
    segments: tl.constexpr = LENGTH // SEGMENT
    number = tl.program_id(0) * 128 + tl.arange(0, 128)
    if tl.program_id(0) * 128 < segments:
        places = stack + FIRST + tl.minimum(number, segments - 1).to(tl.int64) * SEGMENT
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,n",
            [places.to(tl.int64), 2 * SEGMENT],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def find_work(
    counts,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    TILE_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """This program's expert (-1: none), tile of its pairs, part of its columns, pairs and first pair.

    Shared experts come first: their weights were asked for before. Programs of one expert and part follow each other,
    so that its weights come from memory once.
    """
    order = tl.arange(0, EXPERTS_BLOCK)
    expert = (order + EXPERTS - SHARED) % EXPERTS
    count = tl.load(counts + expert, mask=order < EXPERTS, other=0)
    tiles = (count + TILE_M - 1) // TILE_M
    ends = tl.cumsum(tiles * PARTS, 0)
    item = tl.program_id(0)
    place = tl.sum((ends <= item).to(tl.int32), 0)
    own = order == place
    chosen = tl.where(place < EXPERTS, (place + EXPERTS - SHARED) % EXPERTS, -1)
    own_tiles = tl.maximum(tl.sum(tl.where(own, tiles, 0), 0), 1)
    within = item - tl.sum(tl.where(own, ends - tiles * PARTS, 0), 0)
    own_count = tl.sum(tl.where(own, count, 0), 0)
    first = tl.sum(tl.where(expert < chosen, count, 0), 0)
    return chosen, within % own_tiles, within // own_tiles, own_count, first


@triton.jit
def _own_pairs(experts, chosen, tokens, slot, C: tl.constexpr, COLUMNS: tl.constexpr, TOKENS_BLOCK: tl.constexpr):
    """The expert's pairs at these places of their order; 0 where there is none."""
    token = tl.arange(0, TOKENS_BLOCK)
    column = tl.arange(0, COLUMNS)
    inside = (token < tokens)[:, None] & (column < C)[None, :]
    numbers = tl.load(experts + token[:, None] * C + column[None, :], mask=inside, other=-1)
    hits = numbers == chosen
    is_own = tl.sum(hits.to(tl.int32), 1)
    pair = token * C + tl.sum(tl.where(hits, column[None, :], 0), 1)
    place = tl.cumsum(is_own, 0) - 1
    found = (place[None, :] == slot[:, None]) & (is_own > 0)[None, :]
    return tl.sum(tl.where(found, pair[None, :], 0), 1)


@triton.jit(do_not_specialize=["tokens"])
def _gate_up_kernel(
    x,
    stack,
    experts,
    counts,
    pairs,
    output,
    tokens,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS_BLOCK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """(pairs, INNER) ``silu(gate) * up``. ``stack`` is (experts, 2 INNER, WIDTH), the gate's rows first.

    TOKENS_BLOCK 0: ``pairs`` holds the pairs by expert.
    """
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        prefetch_shared(stack, (EXPERTS - SHARED) * 2 * INNER * WIDTH, SHARED * 2 * INNER * WIDTH, 512)
        tl_cuda.gdc_wait()
    parts: tl.constexpr = (INNER + TILE_N - 1) // TILE_N
    chosen, tile, part, count, first = find_work(counts, EXPERTS, SHARED, EXPERTS_BLOCK, TILE_M, parts)
    if chosen < 0:
        return
    slot = tile * TILE_M + tl.arange(0, TILE_M)
    present = slot < count
    if TOKENS_BLOCK > 0:
        pair = _own_pairs(experts, chosen, tokens, slot, C, COLUMNS, TOKENS_BLOCK)
    else:
        pair = tl.load(pairs + first + slot, mask=present, other=0)
    column = part * TILE_N + tl.arange(0, TILE_N)
    is_column = column < INNER
    depth = tl.arange(0, TILE_K)
    source = x + (pair // C).to(tl.int64)[:, None] * WIDTH + depth[None, :]
    gate = stack + chosen.to(tl.int64) * (2 * INNER * WIDTH) + column[:, None] * WIDTH + depth[None, :]
    up = gate + INNER * WIDTH
    gates = tl.zeros((TILE_M, TILE_N), tl.float32)
    ups = tl.zeros((TILE_M, TILE_N), tl.float32)
    for k in tl.range(0, WIDTH, TILE_K, num_stages=STAGES):
        if WIDTH % TILE_K == 0 and INNER % TILE_N == 0:
            g = tl.load(gate + k)
            u = tl.load(up + k)
            a = tl.load(source + k, mask=present[:, None], other=0.0)
        else:
            inside = (k + depth < WIDTH)[None, :]
            g = tl.load(gate + k, mask=is_column[:, None] & inside, other=0.0)
            u = tl.load(up + k, mask=is_column[:, None] & inside, other=0.0)
            a = tl.load(source + k, mask=present[:, None] & inside, other=0.0)
        gates = tl.dot(a, tl.trans(g), gates)
        ups = tl.dot(a, tl.trans(u), ups)
    result = gates / (1.0 + tl.exp(-gates)) * ups
    target = output + pair.to(tl.int64)[:, None] * INNER + column[None, :]
    tl.store(target, result.to(output.dtype.element_ty), mask=present[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _down_kernel(
    x,
    stack,
    experts,
    counts,
    pairs,
    output,
    tokens,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS_BLOCK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """(pairs, WIDTH) out of (pairs, INNER). ``stack`` is (experts, WIDTH, INNER)."""
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        prefetch_shared(stack, (EXPERTS - SHARED) * INNER * WIDTH, SHARED * INNER * WIDTH, 512)
        tl_cuda.gdc_wait()
    parts: tl.constexpr = (WIDTH + TILE_N - 1) // TILE_N
    chosen, tile, part, count, first = find_work(counts, EXPERTS, SHARED, EXPERTS_BLOCK, TILE_M, parts)
    if chosen < 0:
        return
    slot = tile * TILE_M + tl.arange(0, TILE_M)
    present = slot < count
    if TOKENS_BLOCK > 0:
        pair = _own_pairs(experts, chosen, tokens, slot, C, COLUMNS, TOKENS_BLOCK)
    else:
        pair = tl.load(pairs + first + slot, mask=present, other=0)
    column = part * TILE_N + tl.arange(0, TILE_N)
    is_column = column < WIDTH
    depth = tl.arange(0, TILE_K)
    source = x + pair.to(tl.int64)[:, None] * INNER + depth[None, :]
    weight = stack + chosen.to(tl.int64) * (WIDTH * INNER) + column[:, None] * INNER + depth[None, :]
    sums = tl.zeros((TILE_M, TILE_N), tl.float32)
    for k in tl.range(0, INNER, TILE_K, num_stages=STAGES):
        if INNER % TILE_K == 0 and WIDTH % TILE_N == 0:
            w = tl.load(weight + k)
            a = tl.load(source + k, mask=present[:, None], other=0.0)
        else:
            inside = (k + depth < INNER)[None, :]
            w = tl.load(weight + k, mask=is_column[:, None] & inside, other=0.0)
            a = tl.load(source + k, mask=present[:, None] & inside, other=0.0)
        sums = tl.dot(a, tl.trans(w), sums)
    target = output + pair.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(target, sums.to(output.dtype.element_ty), mask=present[:, None] & is_column[None, :])


@triton.jit
def _combine_kernel(
    hidden,
    routed,
    weights,
    experts,
    counts,
    output,
    hidden_stride,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    RESET: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (tokens, parts of the width): the stream and the token's weighted experts, shared ones first, then by rank.

    With RESET the counts are set back to zero.
    """
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = dims < WIDTH
    total = tl.load(hidden + token * hidden_stride + dims, mask=mask, other=0.0).to(tl.float32)
    if tl.load(experts + token * C) >= 0:
        for column in tl.static_range(C):
            pair = token * C + (C - 1 - column)
            weight = tl.load(weights + pair)
            total += weight * tl.load(routed + pair * WIDTH + dims, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + token * WIDTH + dims, total.to(output.dtype.element_ty), mask=mask)
    if RESET and tl.program_id(0) + tl.program_id(1) == 0:
        expert = tl.arange(0, EXPERTS_BLOCK)
        tl.store(counts + expert, tl.zeros((EXPERTS_BLOCK,), tl.int32), mask=expert < EXPERTS)


_gate_up = Launcher(_gate_up_kernel)
_down = Launcher(_down_kernel)
_combine = Launcher(_combine_kernel)


@dataclass(frozen=True, slots=True)
class Grouping:
    """Where a product finds each expert's pairs."""

    counts: torch.Tensor
    """(E,) int32."""
    pairs: torch.Tensor | None
    """(T * C,) int32 by expert; None: programs look for them in the routing."""


def expert_products(routed: Routed, stacks: Stacks, grouping: Grouping, tiles: Tiles, early: bool) -> torch.Tensor:
    """(T * C, width): each pair's expert, not yet weighted. Rows of tokens without experts are not written."""
    tokens, width = routed.normed.shape
    number, inner = stacks.gate_up.shape[0], stacks.down.shape[2]
    shape = (tokens * stacks.columns, width)
    gated = torch.empty((shape[0], inner), dtype=routed.normed.dtype, device=routed.normed.device)
    output = torch.empty(shape, dtype=routed.normed.dtype, device=routed.normed.device)
    pairs = routed.experts if grouping.pairs is None else grouping.pairs
    block = 0 if grouping.pairs is not None else max(16, triton.next_power_of_2(tokens))
    sizes = (width, inner, number, stacks.shared, triton.next_power_of_2(number), stacks.columns)
    products = (
        (_gate_up, tiles.gate_up, routed.normed, stacks.gate_up, gated, inner),
        (_down, tiles.down, gated, stacks.down, output, width),
    )
    for launch, tile, source, stack, target, columns in products:
        launch(
            (stacks.tiles(tokens, tile.pairs) * triton.cdiv(columns, tile.columns), 1, 1),
            (source, stack, routed.experts, grouping.counts, pairs, target),
            fixed=(),
            free=(tokens,),
            constants=(
                *sizes,
                triton.next_power_of_2(stacks.columns),
                block,
                tile.pairs,
                tile.columns,
                tile.depth,
                tile.stages,
                early,
            ),
            warps=tile.warps,
            stages=tile.stages,
            early=early,
        )
    return output


def combine(
    hidden: torch.Tensor, products: torch.Tensor, routed: Routed, number: int, reset: torch.Tensor | None, early: bool
) -> torch.Tensor:
    """(T, width) stream and its tokens' products of ``number`` experts -> the stream after.

    ``reset`` are (number,) int32 counts that are set back to zero.
    """
    tokens, width = hidden.shape
    output = torch.empty((tokens, width), dtype=hidden.dtype, device=hidden.device)
    _combine(
        (tokens, triton.cdiv(width, COMBINE_BLOCK), 1),
        (hidden, products, routed.weights, routed.experts, routed.experts if reset is None else reset, output),
        fixed=(hidden.stride(0),),
        free=(),
        constants=(
            width,
            routed.experts.shape[1],
            number,
            triton.next_power_of_2(number),
            COMBINE_BLOCK,
            reset is not None,
            early,
        ),
        early=early,
    )
    return output
