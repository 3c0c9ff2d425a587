"""Routed experts whose weights are quantized: the products of each stack, and the weighted sum. No step waits.

Pairs of tokens and experts are sorted by expert, whatever their number; a program takes a tile of one expert's pairs
and a tile of its lines, and ends at once where the expert is in another stack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from engines.kernels.cuda.experts import Grouping, combine, find_work
from engines.kernels.cuda.grouping import group_pairs
from engines.kernels.cuda.launch import Launcher
from engines.kernels.cuda.quantized_codes import HALVES, LEVELS
from engines.kernels.cuda.quantized_kernel import wide_product
from engines.kernels.cuda.quantized_rows import round_rows
from engines.kernels.cuda.routing import Routed, choose_experts
from engines.kernels.cuda.scratch import counters
from engines.kernels.cuda.skinny_kernel import finish, tile_line

if TYPE_CHECKING:
    from engines.kernels.experts import RoutedBatch, Router
    from engines.kernels.quantized_experts import ExpertStack, QuantizedStacks

STAGES = 3
FEW_PAIRS, MANY_PAIRS = 16, 64
"""Pairs of a tile: of few for each expert, and of many."""
MANY_FOR_EACH = 32
"""Pairs of an expert, on average, from which its tiles are the larger ones."""


@triton.jit
def quantized_experts_kernel(
    x,
    codes,
    factor,
    scale,
    offset,
    levels,
    row_scale,
    order,
    places,
    counts,
    pairs,
    output,
    stack_lines,
    lines,
    depth,
    padded,
    books,
    book_size,
    x_stride,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SHARING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSETS: tl.constexpr,
    ROUNDED: tl.constexpr,
    ORDERED: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid (work items,). A pair reads row ``pair // SHARING`` of x and writes its own of output.

    ``lines`` are those of an expert, cut into PARTS; ``stack_lines`` of the whole stack.
    """
    two: tl.constexpr = (FORMAT == HALVES) | (FORMAT == LEVELS)
    chosen, tile, part, count, first = find_work(counts, EXPERTS, 0, EXPERTS_BLOCK, BLOCK_M, PARTS)
    if chosen < 0:
        return
    place = tl.load(places + chosen)
    if place < 0:
        return
    slot = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    present = slot < count
    pair = tl.load(pairs + first + slot, mask=present, other=0)
    source = (pair // SHARING).to(tl.int64)
    line = place * lines + tile_line(part, tl.arange(0, BLOCK_N), lines, BLOCK_N, GATED)
    code_lines = codes + line.to(tl.int64) * (padded // 2 if two else padded)
    sums = wide_product(
        x + source * x_stride, present, code_lines, line, stack_lines, scale, offset, levels, books, book_size,
        order + place.to(tl.int64) * depth, 0, padded, depth,
        BLOCK_M, BLOCK_N, UNIT, STAGES, FORMAT, GROUP, OFFSETS, ORDERED, EVEN, ASM,
    )  # fmt: skip
    sums = tl.trans(sums) * tl.load(factor + line)[None, :]
    if ROUNDED:
        sums *= tl.load(row_scale + source, mask=present, other=0.0)[:, None]
    width: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    columns = lines // 2 if GATED else lines
    column = part * width + tl.arange(0, width)
    mask = present[:, None] & (column < columns)[None, :]
    target = output + pair.to(tl.int64)[:, None] * columns + column[None, :]
    finish(sums, 0.0, 0.0, 0.0, 0.0, target, mask, depth, 0.0, BLOCK_M, BLOCK_N, False, 0, False, GATED, False)


_product = Launcher(quantized_experts_kernel)


def route(hidden: torch.Tensor, gain: torch.Tensor, eps: float, router: Router, batch: RoutedBatch) -> Routed:
    """The norm of a bfloat16 stream and each token's experts, where one kernel can choose them."""
    return choose_experts(hidden, gain, eps, router, 0, batch, counters(hidden.device), count=False, early=False)


def routed(normed: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, cache_slots: torch.Tensor) -> Routed:
    """The choice made elsewhere: (T, k) weights, float32, and experts, int64."""
    return Routed(normed, weights, experts.int().masked_fill(cache_slots.unsqueeze(1) < 0, -1))


def quantized_mixture(stream: torch.Tensor, choice: Routed, stacks: QuantizedStacks) -> torch.Tensor:
    """(T, width) ``stream``, to which shared experts have been added, and the routed ones on top of it."""
    tokens = stream.shape[0]
    grouping = group_pairs(choice.experts, stacks.experts)
    gated = _products(choice.normed, stacks.gate_up, stacks, grouping, tokens, 2 * stacks.inner, gated=True)
    products = _products(gated, stacks.down, stacks, grouping, tokens, stacks.width, gated=False)
    return combine(stream, products, choice, stacks.experts, reset=None, early=False)


def _products(
    x: torch.Tensor,
    formats: tuple[ExpertStack, ...],
    stacks: QuantizedStacks,
    grouping: Grouping,
    tokens: int,
    lines: int,
    gated: bool,
) -> torch.Tensor:
    """(pairs, lines, or half as many where gated): of each pair's expert. Rows of x are tokens, or pairs."""
    all_pairs = tokens * stacks.chosen
    output = x.new_empty(all_pairs, lines // 2 if gated else lines)
    rounded: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}
    for stack in formats:
        values, row_scale = x, None
        activations, padded = stack.codes.activations, stack.codes.padded_depth
        if activations != "float":
            key = (activations, padded)
            if key not in rounded:
                rounded[key] = round_rows(x, activations == "float8", None, padded, x.dtype)
            values, row_scale = rounded[key]
        _launch_stack(values, row_scale, stack, stacks, grouping, tokens, all_pairs // x.shape[0], output, gated)
    return output


def _launch_stack(
    x: torch.Tensor,
    row_scale: torch.Tensor | None,
    stack: ExpertStack,
    stacks: QuantizedStacks,
    grouping: Grouping,
    tokens: int,
    sharing: int,
    output: torch.Tensor,
    gated: bool,
) -> None:
    assert grouping.pairs is not None
    codes = stack.codes
    lines = output.shape[1] * (2 if gated else 1)
    few = tokens * stacks.chosen < MANY_FOR_EACH * stacks.experts
    pairs, block_n, warps = (FEW_PAIRS, 64, 4) if few else (MANY_PAIRS, 128, 8)
    parts = triton.cdiv(lines, block_n)
    empty = codes.factor
    _product(
        (stacks.tiles(tokens, pairs) * parts, 1, 1),
        (
            x,
            codes.codes,
            codes.factor,
            empty if codes.scale is None else codes.scale,
            empty if codes.offset is None else codes.offset,
            empty if codes.levels is None else codes.levels,
            empty if row_scale is None else row_scale,
            grouping.pairs if stack.order is None else stack.order,
            stack.places,
            grouping.counts,
            grouping.pairs,
            output,
        ),
        fixed=(codes.lines, lines, codes.depth, codes.padded_depth, codes.books, codes.book_size, x.stride(0)),
        free=(),
        constants=(
            stacks.experts,
            triton.next_power_of_2(stacks.experts),
            parts,
            sharing,
            pairs,
            block_n,
            codes.unit,
            STAGES,
            codes.format,
            codes.group,
            codes.offset_kind,
            row_scale is not None,
            stack.order is not None,
            gated,
            codes.depth == codes.padded_depth,
            not x.is_cpu,
        ),
        warps=warps,
        stages=STAGES,
    )
