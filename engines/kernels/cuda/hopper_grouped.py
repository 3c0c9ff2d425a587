"""The products of many tokens' experts on Hopper (grouped GEMM): gate and up with SiLU, and down, of rows by expert.

The rows of an expert lie together and begin at a multiple of 64, a *slot*; the shared experts, which every token takes,
come first. One program for each processor walks over tiles of two slots of one expert by 128 gated columns, or 256. One
warp finds the tiles and moves tiles of the rows and of the expert's weight into shared memory (the tensor memory
accelerator), 64 numbers of the depth at a time; two groups of four warps multiply a slot each. Where an expert's last
tile has one slot the second group rests, and the first has the matrix units for itself: so the rows of an expert are
filled up to 64, not to 128. All tiles of an expert follow each other, so that its weight comes from memory once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from engines.kernels.cuda.device import processors
from engines.kernels.cuda.hopper_gated import ALIGNMENT, gated_products
from engines.kernels.cuda.hopper_slots import expert_sizes, move_slots, noted
from engines.kernels.cuda.launch import Launcher, Tiled

SLOT, LINES, DEPTH = 64, 128, 64
"""Rows of a group; lines of a weight, or columns of the output, that are moved at once; of the depth."""
MOST_EXPERTS = 128
"""Shared ones counted, that the moving warp keeps in registers."""
MOST_SLOTS, MOST_PARTS = 1 << 20, 1 << 10
"""Of rows and of columns, that a note holds."""
GROUP_REGISTERS, MOVER_REGISTERS = 216, 72


@dataclass(frozen=True, slots=True)
class GroupedTile:
    """How the products are divided."""

    stages: int
    """Loads in shared memory; less than 8."""
    band: int
    """Tiles of rows."""
    lag: int
    """Steps that the second group begins later; less than the stages."""


GATE_UP, DOWN = GroupedTile(stages=4, band=16, lag=1), GroupedTile(stages=3, band=16, lag=1)
"""What is used where nothing else is asked for."""


@dataclass(frozen=True, slots=True)
class Rows:
    """How many rows the experts of a step have."""

    tokens: int
    routed: int
    """Experts that tokens choose."""
    shared: int
    """Experts that all take."""
    most_slots: int
    """Of the routed experts, whatever is chosen."""
    most_tiles: int
    """Of two slots."""

    @property
    def token_slots(self) -> int:
        """Of a shared expert."""
        return -(-self.tokens // SLOT)

    def total(self, shared: int) -> int:
        """Rows with those of ``shared`` shared experts, filled up."""
        return SLOT * (shared * self.token_slots + self.most_slots)


@gluon.jit
def _pass_by(position, steps, full, empty, STAGES: gl.constexpr):
    """What a group does with steps in which it has nothing to multiply."""
    for step in range(0, steps):
        mbarrier.wait(full.index((position + step) % STAGES), (position + step) // STAGES & 1)
        mbarrier.arrive(empty.index((position + step) % STAGES), count=1)


@gluon.jit
def _products(
    position, steps, x_tiles, w_tiles, full, empty, before, STAGES: gl.constexpr, LAG: gl.constexpr,
    GROUP: gl.constexpr
):  # fmt: skip
    """The sums of a tile, 64 x 128 each of the first lines and of the second; those of a column in the same thread."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    both: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    sums = gl.zeros([64, 256], gl.float32, wide)
    for step in range(0, steps):
        place = (position + step) % STAGES
        mbarrier.wait(full.index(place), (position + step) // STAGES & 1)
        w = w_tiles._reinterpret(w_tiles.dtype, [STAGES, 256, 64], both).index(place)
        sums = warpgroup_mma(x_tiles.index(place * 2 + GROUP), w.permute((1, 0)), sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=(sums,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index((position + step + STAGES - 1) % STAGES), count=1, pred=step > 0)
        if LAG > 0 and GROUP == 0:
            mbarrier.arrive(before, count=1, pred=position + step == gl.minimum(LAG, steps) - 1)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    gl.thread_barrier()
    mbarrier.arrive(empty.index((position + steps + STAGES - 1) % STAGES), count=1)
    first, second = sums.reshape([64, 2, 128]).permute((0, 2, 1)).split()
    return (
        gl.convert_layout(first, layout, assert_trivial=True),
        gl.convert_layout(second, layout, assert_trivial=True),
    )


@gluon.jit
def _write(outputs, result, sums, row, column):
    tma.store_wait(0)  # what is in ``result`` from before has been read
    gl.thread_barrier()
    result.store(sums.to(outputs.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(outputs, [row, column], result)


@gluon.jit
def _multiply(
    outputs, x_tiles, w_tiles, result, full, empty, before, notes, counts, tokens, depth, column_tiles,
    ROUTED: gl.constexpr, SHARED: gl.constexpr, PARTS: gl.constexpr, BLOCK: gl.constexpr, GATED: gl.constexpr,
    STAGES: gl.constexpr, LAG: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """A group of four warps. The second waits at its start until the first has done LAG steps."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    _, sizes = expert_sizes(counts, tokens, ROUTED, SHARED, BLOCK, 4)
    total = gl.sum((sizes + 127) // 128, 0) * column_tiles
    shared_slots, depth_steps = SHARED * ((tokens + 63) // 64), (depth + 63) // 64
    position, turn = tokens * 0, tokens * 0
    if LAG > 0 and GROUP > 0:
        mbarrier.wait(before, 0, pred=gl.program_id(0) < total)
    for _number in range(gl.program_id(0), total, gl.num_programs(0)):
        mbarrier.wait(full.index(position % STAGES), position // STAGES & 1)
        slot, column, has_both = noted(notes, turn)
        steps = depth_steps * gl.where(slot < shared_slots, PARTS, 1)
        if GROUP == 0 or has_both:
            first, second = _products(
                position, steps, x_tiles, w_tiles, full, empty, before, STAGES, LAG, GROUP
            )  # fmt: skip
            row = (slot + GROUP) * 64
            if GATED:
                _write(outputs, result, gated_products(first, second, layout), row, column * 128)
            else:
                _write(outputs, result, first, row, column * 256)
                _write(outputs, result, second, row, column * 256 + 128)
        else:
            _pass_by(position, steps, full, empty, STAGES)
        position += steps
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens", "width", "depth"])
def _grouped_kernel(
    inputs,
    shared_inputs,
    weights,
    outputs,
    counts,
    tokens,
    width,
    depth,
    ROUTED: gl.constexpr,
    SHARED: gl.constexpr,
    PARTS: gl.constexpr,
    BLOCK: gl.constexpr,
    GATED: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
    LAG: gl.constexpr,
    GROUP_REGISTERS: gl.constexpr,
    MOVER_REGISTERS: gl.constexpr,
):
    """Grid (any number,), four warps: the first group. Shared experts have outputs of their own, or with PARTS above 1
    the sum of so many; ``width`` is that of the output."""
    dtype: gl.constexpr = weights.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_tiles = gl.allocate_shared_memory(dtype, [STAGES * 2, 64, 64], layout)
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES * 2, 128, 64], layout)
    results = gl.allocate_shared_memory(dtype, [2, 64, 128], layout)
    notes = gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    before = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
    for place in gl.static_range(STAGES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=2)
    mbarrier.init(before, count=1)
    fence_async_shared()
    gl.thread_barrier()

    columns: gl.constexpr = 128 if GATED else 256
    column_tiles = (width + columns - 1) // columns
    gl.warp_specialize(
        [
            (_multiply, (outputs, x_tiles, w_tiles, results.index(0), full, empty, before, notes, counts, tokens, depth,
                         column_tiles, ROUTED, SHARED, PARTS, BLOCK, GATED, STAGES, LAG, 0)),
            (_multiply, (outputs, x_tiles, w_tiles, results.index(1), full, empty, before, notes, counts, tokens, depth,
                         column_tiles, ROUTED, SHARED, PARTS, BLOCK, GATED, STAGES, LAG, 1)),
            (move_slots, (inputs, shared_inputs, weights, x_tiles, w_tiles, full, empty, notes, counts, tokens, width,
                          depth, column_tiles, ROUTED, SHARED, PARTS, BLOCK, GATED, STAGES, BAND)),
        ],
        [4, 1],
        [GROUP_REGISTERS, MOVER_REGISTERS],
    )  # fmt: skip


_grouped = Launcher(_grouped_kernel)


def fits(rows: Rows, width: int, inner: int) -> bool:
    """Whether the kernel takes experts of these widths and rows."""
    sizes = rows.total(rows.shared) // SLOT <= MOST_SLOTS and max(width, inner) <= MOST_PARTS * LINES
    return sizes and rows.routed + rows.shared <= MOST_EXPERTS and width % ALIGNMENT == inner % ALIGNMENT == 0


def gate_up(
    routed: torch.Tensor,
    normed: torch.Tensor,
    stack: torch.Tensor,
    counts: torch.Tensor,
    rows: Rows,
    output: torch.Tensor,
    tile: GroupedTile = GATE_UP,
) -> torch.Tensor:
    """``silu(gate) * up``: (``rows.total(0)``, W) rows of the routed experts, each of which has ``counts``, int32, and
    begins at a slot of its own; (T, W) for the shared ones; the (E, 2 I, W) weight, gate's lines first ->
    ``output``, (``rows.total(rows.shared)``, I), the shared ones' first. Sums and gating are in float32."""
    return _launch(routed, normed, stack, counts, rows, output, rows.shared, True, tile)


def down(
    gated: torch.Tensor,
    stack: torch.Tensor,
    counts: torch.Tensor,
    rows: Rows,
    output: torch.Tensor,
    tile: GroupedTile = DOWN,
) -> torch.Tensor:
    """What ``gate_up`` gave and the (E, W, I) weight -> ``output``, (``rows.total(min(rows.shared, 1))``, W): first the
    sum of the shared experts, then the routed ones' rows."""
    first = rows.total(rows.shared) - rows.total(0)
    return _launch(gated[first:], gated, stack, counts, rows, output, min(rows.shared, 1), False, tile)


def _launch(
    routed: torch.Tensor,
    shared: torch.Tensor,
    stack: torch.Tensor,
    counts: torch.Tensor,
    rows: Rows,
    output: torch.Tensor,
    outputs: int,
    gated: bool,
    tile: GroupedTile,
) -> torch.Tensor:
    """``outputs``: of shared experts."""
    width, weight = output.shape[1], stack.flatten(0, 1)
    columns = -(-width // (LINES if gated else 2 * LINES))
    tiles = (outputs * -(-rows.tokens // (2 * SLOT)) + rows.most_tiles) * columns
    _grouped(
        (min(tiles, processors(output.device)), 1, 1),
        (counts,),
        fixed=(),
        free=(rows.tokens, width, weight.shape[1]),
        constants=(
            rows.routed,
            outputs,
            1 if gated else max(rows.shared, 1),
            MOST_EXPERTS,
            gated,
            tile.stages,
            tile.band,
            tile.lag,
            GROUP_REGISTERS,
            MOVER_REGISTERS,
        ),
        warps=4,
        tiled=(
            Tiled(routed, (SLOT, DEPTH)),
            Tiled(shared, (SLOT, DEPTH)),
            Tiled(weight, (LINES, DEPTH)),
            Tiled(output, (SLOT, LINES)),
        ),
    )
    return output
