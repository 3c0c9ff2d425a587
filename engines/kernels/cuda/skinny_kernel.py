"""Linear layers of few rows: one kernel that reads each weight once, with norm, bias, gating and residual inside.

Such a layer is bound by the bytes of its weight. All programs are resident at once, each with several blocks of
weights on the way, so that the memory is busy from the first to the last moment. Where few programs fill the machine,
several share a tile along the depth (split-K); the last of them to arrive sums what all of them have written, in a
fixed order, so that no second launch is needed and results do not change from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda


@triton.jit
def _line(tile, place, lines, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """Of the weight, at a place of a tile; places past the last line repeat it."""
    line = tile * BLOCK_N + place
    half = lines // 2
    return tl.minimum(line // 2, half - 1) + (line % 2) * half if GATED else tl.minimum(line, lines - 1)


@triton.jit
def _prefetch(start, BYTES: tl.constexpr):
    """Ask the L2 cache for ``BYTES`` at each different ``start`` of a warp: that takes one instruction for each."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,n",
        [start.to(tl.int64), BYTES],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _product(
    x,
    weight_lines,
    gain,
    row_starts,
    valid,
    prefetched,
    start,
    end,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    NORM: tl.constexpr,
    EVEN: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) products over ``start .. end`` of the depth and each row's sum of squares, float32.

    The weight is the left operand, whose tiles are 16 lines; of the right one's, 8 rows are enough. The block of the
    depth is cut into ``PARTS``, one a warp: a chain of small matrix instructions would otherwise take longer than the
    bytes.
    """
    piece: tl.constexpr = BLOCK_K // PARTS
    place = (tl.arange(0, PARTS) * piece)[:, None, None] + tl.arange(0, piece)[None, None, :]
    weight_at = weight_lines[None, :, None] + place
    x_at = x + row_starts[None, :, None] + place
    valid_rows = valid[None, :, None]
    sums = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((PARTS, BLOCK_M, piece), tl.float32)
    for k in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        if AHEAD > 0:
            _prefetch(prefetched + tl.minimum(k + AHEAD, end - BLOCK_K), 2 * BLOCK_K)
        if EVEN:
            block = tl.load(weight_at + k)
            values = tl.load(x_at + k, mask=valid_rows, other=0.0)
        else:
            inside = place + k < depth
            block = tl.load(weight_at + k, mask=inside, other=0.0)
            values = tl.load(x_at + k, mask=valid_rows & inside, other=0.0)
        if NORM:
            if EVEN:
                gains = tl.load(gain + place + k).to(tl.float32)
            else:
                gains = tl.load(gain + place + k, mask=inside, other=0.0).to(tl.float32)
            wide = values.to(tl.float32)
            squares += wide * wide
            values = (wide * gains).to(block.dtype)
        sums = tl.dot(block, tl.permute(values, (0, 2, 1)), sums)
    return tl.trans(tl.sum(sums, 0)), tl.sum(tl.sum(squares, 2), 0)


@triton.jit
def _wide_product(
    x,
    weight_lines,
    gain,
    row_starts,
    valid,
    prefetched,
    start,
    end,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    NORM: tl.constexpr,
    EVEN: tl.constexpr,
):
    """As ``_product``, uncut, for BLOCK_N >= 64: Hopper's wide matrix instructions read both operands from shared
    memory."""
    place = tl.arange(0, BLOCK_K)
    weight_at = weight_lines[:, None] + place[None, :]
    x_at = x + row_starts[:, None] + place[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        if AHEAD > 0:
            _prefetch(prefetched + tl.minimum(k + AHEAD, end - BLOCK_K), 2 * BLOCK_K)
        if EVEN:
            block = tl.load(weight_at + k)
            values = tl.load(x_at + k, mask=valid[:, None], other=0.0)
        else:
            inside = (place + k < depth)[None, :]
            block = tl.load(weight_at + k, mask=inside, other=0.0)
            values = tl.load(x_at + k, mask=valid[:, None] & inside, other=0.0)
        if NORM:
            if EVEN:
                gains = tl.load(gain + place + k).to(tl.float32)
            else:
                gains = tl.load(gain + place + k, mask=place + k < depth, other=0.0).to(tl.float32)
            wide = values.to(tl.float32)
            squares += wide * wide
            values = (wide * gains[None, :]).to(block.dtype)
        sums = tl.dot(block, tl.trans(values), sums)
    return tl.trans(sums), tl.sum(squares, 1)


@triton.jit
def _sum_splits(
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
def _finish(
    sums,
    squares,
    shifts,
    added,
    place,
    mask,
    depth,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """What follows the product: the norm's scale, bias, gating, residual, the one rounding, the store."""
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
    tl.store(place, result.to(place.dtype.element_ty), mask=mask)


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
):
    """Grid (tiles of BLOCK_N weight lines, SPLITS). x is (rows, depth), weight (lines, depth), output contiguous.

    GATED: a tile has the gate's line and the up's line of a column side by side. PREFETCH: bytes of each line that the
    L2 cache is asked for before x is there; then it is asked for what lies AHEAD values further, and at the end
    for the beginning of the tile that is FOLLOWING tiles further. PARTS 0: ``_wide_product``.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    if EARLY:
        tl_cuda.gdc_launch_dependents()
    line = _line(tile, tl.arange(0, BLOCK_N), lines, BLOCK_N, GATED)
    chunk = tl.cdiv(tl.cdiv(depth, BLOCK_K), SPLITS) * BLOCK_K
    start = split * chunk
    end = tl.minimum(start + chunk, depth)
    weight_lines = weight + line.to(tl.int64) * depth
    prefetched, place = weight, 0
    if PREFETCH > 0:
        # The warps share the lines out.
        thread, each = tl.arange(0, 32 * WARPS), BLOCK_N // WARPS
        place = thread // 32 * each + thread % each
        prefetched = weight + _line(tile, place, lines, BLOCK_N, GATED).to(tl.int64) * depth
        _prefetch(prefetched + start, PREFETCH)
    if EARLY:
        tl_cuda.gdc_wait()

    row = tl.arange(0, BLOCK_M)
    valid = row < rows
    width: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    columns = lines // 2 if GATED else lines
    column = tile * width + tl.arange(0, width)
    mask = valid[:, None] & (column < columns)[None, :]
    # Asked for before the product, so that nobody waits for them after it.
    shifts = tl.load(bias + line) if BIAS else 0.0
    added = 0.0
    if RESIDUAL:
        added = tl.load(residual + (row * residual_stride)[:, None] + column[None, :], mask=mask, other=0.0)
    if PARTS == 0:
        sums, squares = _wide_product(
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
        sums, squares = _product(
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
        _prefetch(weight + _line(following, place, lines, BLOCK_N, GATED).to(tl.int64) * depth, PREFETCH)
    last = True
    if SPLITS > 1:
        sums, squares, last = _sum_splits(
            sums, squares, partials, counters, tile, split, BLOCK_M, BLOCK_N, SPLITS, NORM
        )
    if last:
        target = output + (row * columns)[:, None] + column[None, :]
        _finish(sums, squares, shifts, added, target, mask, depth, eps, BLOCK_M, BLOCK_N, NORM, BIAS, GATED, RESIDUAL)
