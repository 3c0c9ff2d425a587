"""The experts of a step of one token: two launches that know its experts without any search.

The second has all of the token's experts in each program, one a warp, and so the weighted sum and the stream in it. It
asks for its first weights before its input is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from engines.kernels.cuda.expert_tuning import Tiles
from engines.kernels.cuda.experts import prefetch_shared
from engines.kernels.cuda.launch import Launcher
from engines.kernels.cuda.routing import Routed

if TYPE_CHECKING:
    from engines.kernels.experts import Stacks

AHEAD = 1024
"""Bytes of its lines that a program of the second asks for before its input is there."""


@triton.jit
def _prefetch_lines(start, wanted, BYTES: tl.constexpr):
    """Ask the L2 cache for ``BYTES`` at each ``start`` that is wanted."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
        "=r,l,r,n",
        [start.to(tl.int64), wanted.to(tl.int32), BYTES],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _gate_up_one_kernel(
    x,
    stack,
    experts,
    output,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    C: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (C * parts of INNER,). (C, INNER) ``silu(gate) * up``, shared experts first: their weights were asked for
    before. ``stack`` is (experts, 2 INNER, WIDTH), the gate's rows first."""
    if EARLY:
        prefetch_shared(stack, (EXPERTS - SHARED) * 2 * INNER * WIDTH, SHARED * 2 * INNER * WIDTH, 512)
        tl_cuda.gdc_wait()
        # Not before the choice is there, of which the next kernel makes its own requests.
        tl_cuda.gdc_launch_dependents()
    parts: tl.constexpr = (INNER + TILE_N - 1) // TILE_N
    place, part = C - 1 - tl.program_id(0) // parts, tl.program_id(0) % parts
    chosen = tl.load(experts + place)
    if chosen < 0:
        return
    column = part * TILE_N + tl.arange(0, TILE_N)
    depth = tl.arange(0, TILE_K)
    row = tl.arange(0, 16)[:, None]
    first = row == 0
    source = x + row * 0 + depth[None, :]
    gate = stack + chosen.to(tl.int64) * (2 * INNER * WIDTH) + column[:, None] * WIDTH + depth[None, :]
    up = gate + INNER * WIDTH
    gates = tl.zeros((16, TILE_N), tl.float32)
    ups = tl.zeros((16, TILE_N), tl.float32)
    for k in tl.range(0, WIDTH, TILE_K, num_stages=STAGES):
        if WIDTH % TILE_K == 0 and INNER % TILE_N == 0:
            g = tl.load(gate + k)
            u = tl.load(up + k)
            a = tl.load(source + k, mask=first, other=0.0)
        else:
            inside = (k + depth < WIDTH)[None, :]
            mask = (column < INNER)[:, None] & inside
            g = tl.load(gate + k, mask=mask, other=0.0)
            u = tl.load(up + k, mask=mask, other=0.0)
            a = tl.load(source + k, mask=first & inside, other=0.0)
        gates = tl.dot(a, tl.trans(g), gates)
        ups = tl.dot(a, tl.trans(u), ups)
    result = gates / (1.0 + tl.exp(-gates)) * ups
    target = output + place * INNER + row * 0 + column[None, :]
    tl.store(target, result.to(output.dtype.element_ty), mask=first & (column < INNER)[None, :])


@triton.jit
def _down_one_kernel(
    x,
    stack,
    weights,
    experts,
    hidden,
    output,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (parts of WIDTH,). The (WIDTH,) stream and the weighted products of (C, INNER) with the token's experts.

    ``stack`` is (experts, WIDTH, INNER). The weights are the left operand, whose tiles are 16 lines; of the right
    one's, 8 rows are enough, of which the first is the token.
    """
    first = tl.program_id(0) * TILE_N
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        if AHEAD > 0:
            line = tl.arange(0, COLUMNS * TILE_N)
            place = tl.minimum(line // TILE_N, C - 1)
            # Read again below: until the wait nobody promises that it is this step's choice.
            early = tl.load(experts + place, cache_modifier=".cg")
            early = tl.minimum(tl.maximum(early, 0), EXPERTS - 1).to(tl.int64)
            row = tl.minimum(first + line % TILE_N, WIDTH - 1)
            _prefetch_lines(stack + (early * WIDTH + row) * INNER, line < C * TILE_N, AHEAD)
        tl_cuda.gdc_wait()
    column = first + tl.arange(0, TILE_N)
    is_column = column < WIDTH
    place = tl.arange(0, COLUMNS)
    chosen = tl.load(experts + place, mask=place < C, other=-1)
    share = tl.load(weights + place, mask=place < C, other=0.0)
    added = tl.load(hidden + column, mask=is_column, other=0.0)
    taken = (chosen >= 0)[:, None, None]
    depth = tl.arange(0, TILE_K)[None, None, :]
    row = tl.arange(0, 8)[None, :, None]
    line = tl.maximum(chosen, 0).to(tl.int64)[:, None, None] * WIDTH + column[None, :, None]
    weight = stack + line * INNER + depth
    source = x + place[:, None, None] * INNER + row * 0 + depth
    sums = tl.zeros((COLUMNS, TILE_N, 8), tl.float32)
    for k in tl.range(0, INNER, TILE_K, num_stages=STAGES):
        if INNER % TILE_K == 0 and WIDTH % TILE_N == 0 and C == COLUMNS:
            w = tl.load(weight + k)
            a = tl.load(source + k, mask=taken & (row == 0), other=0.0)
        else:
            inside = k + depth < INNER
            w = tl.load(weight + k, mask=taken & is_column[None, :, None] & inside, other=0.0)
            a = tl.load(source + k, mask=taken & (row == 0) & inside, other=0.0)
        sums = tl.dot(w, tl.permute(a, (0, 2, 1)), sums)
    total = tl.sum(tl.sum(sums, 2) * share[:, None], 0) + added.to(tl.float32)
    tl.store(output + column, total.to(output.dtype.element_ty), mask=is_column)


_gate_up_one = Launcher(_gate_up_one_kernel)
_down_one = Launcher(_down_one_kernel)


def one_token(hidden: torch.Tensor, routed: Routed, stacks: Stacks, tiles: Tiles, early: bool) -> torch.Tensor:
    """(1, width) stream and its token's choice -> the stream after the layer."""
    width, (number, _, inner) = hidden.shape[1], stacks.down.shape
    wide, narrow, columns = tiles.gate_up, tiles.down, stacks.columns
    gated = torch.empty((columns, inner), dtype=hidden.dtype, device=hidden.device)
    output = torch.empty_like(routed.normed)
    parts = triton.cdiv(inner, wide.columns)
    # What is asked for begins and ends at multiples of 16 bytes.
    ahead = min(AHEAD, 2 * inner) if early and inner % 8 == 0 else 0
    _gate_up_one(
        (columns * parts, 1, 1),
        (routed.normed, stacks.gate_up, routed.experts, gated),
        fixed=(),
        free=(),
        constants=(
            *(width, inner, number, stacks.shared, columns),
            *(wide.columns, wide.depth, wide.stages, early),
        ),
        warps=wide.warps,
        stages=wide.stages,
        early=early,
    )
    _down_one(
        (triton.cdiv(width, narrow.columns), 1, 1),
        (gated, stacks.down, routed.weights, routed.experts, hidden, output),
        fixed=(),
        free=(),
        constants=(
            *(width, inner, number, columns, triton.next_power_of_2(columns)),
            *(narrow.columns, narrow.depth, narrow.stages, ahead, early),
        ),
        warps=narrow.warps,
        stages=narrow.stages,
        early=early,
    )
    return output
