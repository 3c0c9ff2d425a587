"""Linear layers of few rows: one kernel that reads each weight once, with norm, bias, gating and residual inside.

Such a layer is bound by the bytes of its weight. All programs are resident at once, each with several blocks of
weights on the way, so that the memory is busy from the first to the last moment. Where few programs fill the machine,
several share a tile along the depth (split-K); the last of them to arrive sums what all of them have written, in a
fixed order, so that no second launch is needed and results do not change from run to run.

A norm inside costs: each program squares and multiplies all of x. So the kernel that writes the residual stream can
hand the next layer's norm over: the stream times the gain, and the sum of squares of each row's part in each tile. What
is left to the layer that reads it is one scale a row, after its product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from engines.kernels.cuda.skinny_product import narrow_product, prefetch, wide_product


@triton.jit
def tile_line(tile, place, lines, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """Of the weight, at a place of a tile; places past the last line repeat it."""
    line = tile * BLOCK_N + place
    half = lines // 2
    return tl.minimum(line // 2, half - 1) + (line % 2) * half if GATED else tl.minimum(line, lines - 1)


@triton.jit
def sum_splits(
    sums,
    squares,
    partials,
    counters,
    tile,
    split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
):
    """Leave this program's partial sums in memory; the last program of a tile gets the sums of all, the others
    ``last`` False."""
    size: tl.constexpr = BLOCK_M * BLOCK_N + BLOCK_M
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    place = row[:, None] * BLOCK_N + column[None, :]
    base = partials + tile * (SPLITS * size)
    tl.store(base + split * size + place, sums)
    if NORM:
        tl.store(base + split * size + BLOCK_M * BLOCK_N + row, squares)
    # All threads have stored before one of them counts; the count orders the stores before the last one's loads.
    tl.debug_barrier()
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.debug_barrier()
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        squares = tl.zeros((BLOCK_M,), tl.float32)
        # Small tiles are asked for all at once; of large ones, one is enough on the way and all are too many registers.
        at_once: tl.constexpr = SPLITS if BLOCK_M * BLOCK_N <= 2048 else 1
        for other in tl.range(0, SPLITS, loop_unroll_factor=at_once):
            sums += tl.load(base + other * size + place, cache_modifier=".cg")
            if NORM:
                squares += tl.load(base + other * size + BLOCK_M * BLOCK_N + row, cache_modifier=".cg")
        tl.store(counters + tile, 0)
    return sums, squares, last


@triton.jit
def load_handed(squares, row, valid, HANDED: tl.constexpr, HANDED_BLOCK: tl.constexpr):
    """(rows, HANDED_BLOCK) sums of squares, zeros behind HANDED."""
    sums = 0.0
    if HANDED > 0:
        part = tl.arange(0, HANDED_BLOCK)
        mask = valid[:, None] & (part < HANDED)[None, :]
        sums = tl.load(squares + (row * HANDED)[:, None] + part[None, :], mask=mask, other=0.0)
    return sums


@triton.jit
def finish(
    sums,
    squares,
    handed,
    shifts,
    added,
    place,
    mask,
    depth,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
    HANDED: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """What follows the product: the norm's scale, bias, gating, residual, the one rounding, the store; returns what
    was stored."""
    if HANDED > 0:
        sums *= tl.rsqrt(tl.sum(handed, 1) / depth + eps)[:, None]
    if NORM:
        sums *= tl.rsqrt(squares / depth + eps)[:, None]
    if BIAS:
        sums += shifts.to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(sums, (BLOCK_M, BLOCK_N // 2, 2)))
        result = gate / (1.0 + tl.exp(-gate)) * up
    else:
        result = sums
    if RESIDUAL:
        result += added.to(tl.float32)
    rounded = result.to(place.dtype.element_ty)
    tl.store(place, rounded, mask=mask)
    return rounded


@triton.jit
def hand_over(hidden, gains, scaled_place, squares_place, mask, valid):
    """What the norm of the layer that reads ``hidden`` next needs of this tile."""
    wide = hidden.to(tl.float32)
    scaled = wide * gains.to(tl.float32)[None, :]
    tl.store(scaled_place, scaled.to(scaled_place.dtype.element_ty), mask=mask)
    tl.store(squares_place, tl.sum(tl.where(mask, wide * wide, 0.0), 1), mask=valid)


@triton.jit(do_not_specialize=["rows"])
def skinny_kernel(
    x,
    weight,
    gain,
    bias,
    residual,
    output,
    partials,
    counters,
    handed_squares,
    next_gain,
    next_scaled,
    next_squares,
    lines,
    depth,
    x_stride,
    residual_stride,
    rows,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    AHEAD: tl.constexpr,
    FOLLOWING: tl.constexpr,
    WARPS: tl.constexpr,
    EARLY: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
    HANDED: tl.constexpr,
    HANDED_BLOCK: tl.constexpr,
    NEXT: tl.constexpr,
):
    """Grid (tiles of BLOCK_N weight lines, SPLITS). x is (rows, depth), weight (lines, depth), output contiguous.

    GATED: a tile has the gate's line and the up's line of a column side by side. PREFETCH: bytes of each line that the
    L2 cache is asked for before x is there; then it is asked for what lies AHEAD values further, and at the end
    for the beginning of the tile that is FOLLOWING tiles further. PARTS 0: ``wide_product``.

    HANDED: x was handed over, with (rows, HANDED) ``handed_squares``; HANDED_BLOCK is the power of two that holds them.
    NEXT: hand over, ``next_scaled`` laid out as the output and (rows, tiles) ``next_squares``, float32.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    if EARLY:
        tl_cuda.gdc_launch_dependents()
    line = tile_line(tile, tl.arange(0, BLOCK_N), lines, BLOCK_N, GATED)
    chunk = tl.cdiv(tl.cdiv(depth, BLOCK_K), SPLITS) * BLOCK_K
    start = split * chunk
    end = tl.minimum(start + chunk, depth)
    weight_lines = weight + line.to(tl.int64) * depth
    prefetched, lane = weight, 0
    if PREFETCH > 0:
        # The warps share the lines out.
        thread, each = tl.arange(0, 32 * WARPS), BLOCK_N // WARPS
        lane = thread // 32 * each + thread % each
        prefetched = weight + tile_line(tile, lane, lines, BLOCK_N, GATED).to(tl.int64) * depth
        prefetch(prefetched + start, PREFETCH)
    row = tl.arange(0, BLOCK_M)
    valid = row < rows
    width: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    columns = lines // 2 if GATED else lines
    column = tile * width + tl.arange(0, width)
    mask = valid[:, None] & (column < columns)[None, :]
    # Asked for before the product, so that nobody waits for them after it; no kernel writes these two.
    shifts = tl.load(bias + line) if BIAS else 0.0
    gains = tl.load(next_gain + column, mask=column < columns, other=0.0) if NEXT else 0.0
    if EARLY:
        tl_cuda.gdc_wait()

    added = 0.0
    if RESIDUAL:
        added = tl.load(residual + (row * residual_stride)[:, None] + column[None, :], mask=mask, other=0.0)
    handed = load_handed(handed_squares, row, valid, HANDED, HANDED_BLOCK)
    if PARTS == 0:
        sums, squares = wide_product(
            x,
            weight_lines,
            gain,
            row * x_stride,
            valid,
            prefetched,
            start,
            end,
            depth,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            STAGES,
            AHEAD,
            NORM,
            EVEN,
        )
    else:
        sums, squares = narrow_product(
            x,
            weight_lines,
            gain,
            row * x_stride,
            valid,
            prefetched,
            start,
            end,
            depth,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            PARTS,
            STAGES,
            AHEAD,
            NORM,
            EVEN,
        )
    if FOLLOWING > 0:
        # While this program ends and that tile's starts in its place, memory would have nothing to do.
        following = tl.minimum(tile + FOLLOWING, tl.num_programs(0) - 1)
        prefetch(weight + tile_line(following, lane, lines, BLOCK_N, GATED).to(tl.int64) * depth, PREFETCH)
    last = True
    if SPLITS > 1:
        sums, squares, last = sum_splits(sums, squares, partials, counters, tile, split, BLOCK_M, BLOCK_N, SPLITS, NORM)
    if last:
        place = (row * columns)[:, None] + column[None, :]
        hidden = finish(
            sums,
            squares,
            handed,
            shifts,
            added,
            output + place,
            mask,
            depth,
            eps,
            BLOCK_M,
            BLOCK_N,
            NORM,
            HANDED,
            BIAS,
            GATED,
            RESIDUAL,
        )
        if NEXT:
            squares_place = next_squares + row * tl.num_programs(0) + tile
            hand_over(hidden, gains, next_scaled + place, squares_place, mask, valid)
