"""Experts of many tokens where Hopper's grouped products run: rows spread by expert, gate and up, down, the sum.

A token's row is copied to each of its experts, so that the products read and write rows that lie together; the shared
experts read the tokens' own rows, and their outputs are summed in the product. The sum takes each token's rows from
where its experts left them.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from engines.kernels.cuda.device import runs_gluon
from engines.kernels.cuda.experts import COMBINE_BLOCK
from engines.kernels.cuda.grouping import place_pairs
from engines.kernels.cuda.launch import Launcher
from engines.kernels.cuda.routing import Routed

if TYPE_CHECKING:
    from engines.kernels.cuda.hopper_grouped import GroupedTile
    from engines.kernels.experts import Stacks

FEWEST_TOKENS = 257
"""From which on this is faster than the kernels of ``experts``: up to 256 they find their pairs themselves."""


@triton.jit
def _spread_kernel(
    x,
    experts,
    places,
    output,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    C: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    """Grid (tokens,): a token's row, to the place of each of its chosen experts."""
    token = tl.program_id(0).to(tl.int64)
    if tl.load(experts + token * C) < 0:
        return
    dims = tl.arange(0, WIDTH_BLOCK)
    row = tl.load(x + token * WIDTH + dims, mask=dims < WIDTH, other=0.0)
    for column in tl.static_range(CHOSEN):
        place = tl.load(places + token * C + column).to(tl.int64)
        tl.store(output + place * WIDTH + dims, row, mask=dims < WIDTH)


@triton.jit(do_not_specialize=["shared_rows"])
def _sum_kernel(
    hidden,
    products,
    weights,
    experts,
    places,
    output,
    hidden_stride,
    shared_rows,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (tokens, parts of the width): the stream, the shared experts' sum, the weighted experts, last rank first."""
    token = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = dims < WIDTH
    total = tl.load(hidden + token * hidden_stride + dims, mask=mask, other=0.0).to(tl.float32)
    if tl.load(experts + token * C) >= 0:
        if CHOSEN < C:
            total += tl.load(products + token * WIDTH + dims, mask=mask, other=0.0).to(tl.float32)
        for rank in tl.static_range(CHOSEN):
            pair = token * C + (CHOSEN - 1 - rank)
            row = shared_rows + tl.load(places + pair).to(tl.int64)
            product = tl.load(products + row * WIDTH + dims, mask=mask, other=0.0).to(tl.float32)
            total += tl.load(weights + pair) * product
    tl.store(output + token * WIDTH + dims, total.to(output.dtype.element_ty), mask=mask)


_spread = Launcher(_spread_kernel)
_sum = Launcher(_sum_kernel)


@functools.cache
def _hopper_kernel(device: torch.device) -> ModuleType | None:
    """The products' file, where this device and this Triton run it."""
    if not runs_gluon(device):
        return None
    from engines.kernels.cuda import hopper_grouped

    return hopper_grouped


def grouped_mixture(
    hidden: torch.Tensor, routed: Routed, stacks: Stacks, tiles: tuple[GroupedTile, GroupedTile] | None = None
) -> torch.Tensor | None:
    """(T, width) stream -> the stream after the layer; None where other kernels are faster or these do not fit.

    ``tiles`` are those of gate-up and of down; None: the built-in ones.
    """
    kernel = _hopper_kernel(hidden.device)
    if kernel is None or hidden.shape[0] < FEWEST_TOKENS:
        return None
    (tokens, width), (number, _, inner) = hidden.shape, stacks.down.shape
    slots, doubles = (stacks.chosen_tiles(tokens, size) for size in (kernel.SLOT, 2 * kernel.SLOT))
    rows = kernel.Rows(tokens, number - stacks.shared, stacks.shared, slots, doubles)
    if not kernel.fits(rows, width, inner):
        return None
    counts, places = place_pairs(routed.experts, number, kernel.SLOT)
    first = rows.total(min(stacks.shared, 1)) - rows.total(0)
    # The rows that are spread are read before down writes, and take the same memory.
    products = torch.empty((first + rows.total(0), width), dtype=hidden.dtype, device=hidden.device)
    spread = spread_rows(routed, places, stacks, products[first:])
    gated = torch.empty((rows.total(stacks.shared), inner), dtype=hidden.dtype, device=hidden.device)
    gate_up, down = tiles or (kernel.GATE_UP, kernel.DOWN)
    kernel.gate_up(spread, routed.normed, stacks.gate_up, counts, rows, gated, gate_up)
    kernel.down(gated, stacks.down, counts, rows, products, down)
    return sum_products(hidden, products, routed, places, stacks, first)


def spread_rows(routed: Routed, places: torch.Tensor, stacks: Stacks, output: torch.Tensor) -> torch.Tensor:
    """(T, width) normed tokens -> ``output``, (rows, width): each at the places of its chosen experts."""
    tokens, width = routed.normed.shape
    _spread(
        (tokens, 1, 1),
        (routed.normed, routed.experts, places, output),
        fixed=(),
        free=(),
        constants=(width, triton.next_power_of_2(width), stacks.columns, stacks.chosen),
    )
    return output


def sum_products(
    hidden: torch.Tensor,
    products: torch.Tensor,
    routed: Routed,
    places: torch.Tensor,
    stacks: Stacks,
    shared_rows: int,
) -> torch.Tensor:
    """(T, width) stream and the rows of its experts' products, the first ``shared_rows`` the shared ones' -> the stream
    after."""
    tokens, width = hidden.shape
    output = torch.empty((tokens, width), dtype=hidden.dtype, device=hidden.device)
    _sum(
        (tokens, triton.cdiv(width, COMBINE_BLOCK), 1),
        (hidden, products, routed.weights, routed.experts, places, output),
        fixed=(hidden.stride(0),),
        free=(shared_rows,),
        constants=(width, stacks.columns, stacks.chosen, COMBINE_BLOCK),
    )
    return output
