"""Gated linear layers of many rows on Hopper: ``silu(x gate^T) * (x up^T)``, in one kernel at the rate of the products.

One program for each processor walks over tiles of 128 rows by 128 columns. One warp moves tiles of the input and of
both weights into shared memory (the tensor memory accelerator), 64 numbers of the depth at a time; each of two groups
of four warps multiplies 64 rows by gate and up in one product, so that both sums of a column are in the same thread,
gates them in float32, and hands the result over to be written while it multiplies the next tile. Tiles are taken in
bands of rows, column after column, so that what runs at the same time shares its input and weights in the L2 cache.
With a *lag*, the second group stays some steps behind the first one: while one gates, the other multiplies.
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
from engines.kernels.cuda.launch import Launcher, Tiled

ROWS, COLUMNS, DEPTH = 64, 128, 64
"""Of a group, of which there are two; of the output in a tile; of what is loaded at once."""
ALIGNMENT = 8
"""Numbers: rows begin at multiples of 16 bytes, which the hardware that moves tiles asks for."""
GROUP_REGISTERS, MOVER_REGISTERS = 240, 24


@dataclass(frozen=True, slots=True)
class GatedTile:
    """How the products are divided."""

    stages: int
    """Loads in shared memory."""
    band: int
    """Tiles of rows."""
    lag: int
    """Steps; less than the stages."""


BUILT_IN = GatedTile(stages=4, band=32, lag=1)


@gluon.jit
def _place(number, row_tiles, column_tiles, BAND: gl.constexpr):
    """Row and column of the tile of this number, in tiles."""
    first = number // (BAND * column_tiles) * BAND
    height = gl.minimum(row_tiles - first, BAND)
    inside = number - first * column_tiles
    return first + inside % height, inside // height


@gluon.jit
def _one_and_power(x):
    """1 + exp(-x), at most 2^60: the product of two is a finite number."""
    exponent = gl.minimum(x * -1.4426950408889634, 60.0)
    return 1.0 + gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [exponent], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def gated_products(gate, up, layout: gl.constexpr):
    """``silu(gate) * up`` of 64 x 128. Two neighbours share a reciprocal: those take longest, and powers as long."""
    even, odd = gate.reshape([64, 64, 2]).split()
    even_up, odd_up = up.reshape([64, 64, 2]).split()
    below, beside = _one_and_power(even), _one_and_power(odd)
    inverse = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [below * beside], dtype=gl.float32, is_pure=True, pack=1
    )
    gated = gl.join(even * even_up * (inverse * beside), odd * odd_up * (inverse * below)).reshape([64, 128])
    return gl.convert_layout(gated, layout, assert_trivial=True)


@gluon.jit
def _move(
    inputs, weights, x_tiles, w_tiles, full, empty, row_tiles, column_tiles, steps, width, STAGES: gl.constexpr,
    BAND: gl.constexpr
):  # fmt: skip
    """The moving warp."""
    position = row_tiles * 0
    for number in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row, column = _place(number, row_tiles, column_tiles, BAND)
        for step in range(0, steps):
            slot = position % STAGES
            # The first waits, for what came before the barriers' first phase, end at once.
            mbarrier.wait(empty.index(slot), position // STAGES & 1 ^ 1)
            ready = full.index(slot)
            mbarrier.expect(ready, (2 * 64 + 2 * 128) * 128)
            for group in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    inputs, [(row * 2 + group) * 64, step * 64], ready, x_tiles.index(slot * 2 + group)
                )
            tma.async_copy_global_to_shared(weights, [column * 128, step * 64], ready, w_tiles.index(slot * 2))
            tma.async_copy_global_to_shared(
                weights, [width + column * 128, step * 64], ready, w_tiles.index(slot * 2 + 1)
            )
            position += 1


@gluon.jit
def _multiply(
    outputs, x_tiles, w_tiles, result, full, empty, before, row_tiles, column_tiles, steps, STAGES: gl.constexpr,
    BAND: gl.constexpr, LAG: gl.constexpr, SECOND: gl.constexpr
):  # fmt: skip
    """A group of four warps. With a LAG the SECOND one waits at its start for its own of the barriers ``before``."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    both: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    gates_and_ups = w_tiles._reinterpret(w_tiles.dtype, [STAGES, 256, 64], shared)
    position = row_tiles * 0
    if LAG > 0 and SECOND:
        mbarrier.wait(before.index(1), 0, pred=gl.program_id(0) < row_tiles * column_tiles)
    for number in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row, column = _place(number, row_tiles, column_tiles, BAND)
        sums = gl.zeros([64, 256], gl.float32, both)
        for step in range(0, steps):
            slot = position % STAGES
            mbarrier.wait(full.index(slot), position // STAGES & 1)
            x, w = x_tiles.index(slot * 2 + SECOND), gates_and_ups.index(slot).permute((1, 0))
            sums = warpgroup_mma(x, w, sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=(sums,))
            gl.thread_barrier()
            mbarrier.arrive(empty.index((position + STAGES - 1) % STAGES), count=1, pred=step > 0)
            if LAG > 0 and not SECOND:
                mbarrier.arrive(before.index(1), count=1, pred=position == gl.minimum(LAG, steps) - 1)
            position += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        gate, up = sums.reshape([64, 2, 128]).permute((0, 2, 1)).split()
        gate = gl.convert_layout(gate, layout, assert_trivial=True)
        up = gl.convert_layout(up, layout, assert_trivial=True)
        gl.thread_barrier()
        mbarrier.arrive(empty.index((position + STAGES - 1) % STAGES), count=1)
        gated = gated_products(gate, up, layout)
        tma.store_wait(0)  # what is in ``result`` from the tile before has been read
        gl.thread_barrier()
        result.store(gated.to(outputs.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(outputs, [(row * 2 + SECOND) * 64, column * 128], result)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "width", "depth"])
def _gated_kernel(
    inputs,
    weights,
    outputs,
    output,
    rows,
    width,
    depth,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
    LAG: gl.constexpr,
    GROUP_REGISTERS: gl.constexpr,
    MOVER_REGISTERS: gl.constexpr,
):
    """Grid (any number,), four warps: the first group. ``output`` tells the type."""
    dtype: gl.constexpr = output.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_tiles = gl.allocate_shared_memory(dtype, [STAGES * 2, 64, 64], layout)
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES * 2, 128, 64], layout)
    results = gl.allocate_shared_memory(dtype, [2, 64, 128], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    before = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    for group in gl.static_range(2):
        mbarrier.init(before.index(group), count=1)
    fence_async_shared()
    gl.thread_barrier()

    row_tiles = (rows + 127) // 128
    column_tiles = (width + 127) // 128
    steps = (depth + 63) // 64
    gl.warp_specialize(
        [
            (_multiply, (outputs, x_tiles, w_tiles, results.index(0), full, empty, before, row_tiles, column_tiles,
                         steps, STAGES, BAND, LAG, 0)),
            (_multiply, (outputs, x_tiles, w_tiles, results.index(1), full, empty, before, row_tiles, column_tiles,
                         steps, STAGES, BAND, LAG, 1)),
            (_move, (inputs, weights, x_tiles, w_tiles, full, empty, row_tiles, column_tiles, steps, width, STAGES,
                     BAND)),
        ],
        [4, 1],
        [GROUP_REGISTERS, MOVER_REGISTERS],
    )  # fmt: skip


_gated = Launcher(_gated_kernel)


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel takes a (T, K) input and a contiguous (2 I, K) weight of one 16-bit type."""
    (lines, depth), stride = weight.shape, x.stride(0)
    aligned = lines % (2 * ALIGNMENT) == 0 and depth % ALIGNMENT == 0 and stride % ALIGNMENT == 0
    begins = x.is_meta or x.data_ptr() % (2 * ALIGNMENT) == 0
    return aligned and begins and x.stride(1) == 1 and x.shape[0] > 0


def waves(rows: int, width: int, device: torch.device) -> float:
    """Tiles of an output of that size for each processor."""
    return _tiles(rows, width) / processors(device)


def _tiles(rows: int, width: int) -> int:
    return -(-rows // (2 * ROWS)) * -(-width // COLUMNS)


def gated_linear(
    x: torch.Tensor, weight: torch.Tensor, output: torch.Tensor, tile: GatedTile = BUILT_IN
) -> torch.Tensor:
    """(T, K), (2 I, K) with the gate's rows first -> ``output``, contiguous (T, I): ``silu(gate) * up``.

    Sums and gating are in float32. T is at least 1.
    """
    rows, depth = x.shape
    width = output.shape[1]
    _gated(
        (min(_tiles(rows, width), processors(x.device)), 1, 1),
        (output,),
        fixed=(),
        free=(rows, width, depth),
        constants=(tile.stages, tile.band, tile.lag, GROUP_REGISTERS, MOVER_REGISTERS),
        warps=4,
        tiled=(Tiled(x, (ROWS, DEPTH)), Tiled(weight, (COLUMNS, DEPTH)), Tiled(output, (ROWS, COLUMNS))),
    )
    return output
