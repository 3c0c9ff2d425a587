"""Products with quantized weights: one kernel that reads each code once and keeps weights in registers.

Codes become bfloat16 exactly, products of a group are summed in float32, and the group's scale is applied to that sum:
closer to the definition than weights rounded to 16 bits, and one multiplication a group instead of one a weight. An
offset needs the sum of the group's input beside it.

For few rows the program's warps share the depth and its tile's lines are few (``narrow_product``); for more of them all
warps take wide matrix instructions with the weight in registers (``wide_product``). Split depths, early starts, gating
and residual are as in ``skinny_kernel``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from engines.kernels.cuda.quantized_codes import HALVES, LEVELS, OFFSET, ZERO_POINT, halves_of, level_values, values_of
from engines.kernels.cuda.skinny_kernel import finish, hand_over, load_handed, sum_splits, tile_line
from engines.kernels.cuda.skinny_product import prefetch


@triton.jit
def _group_sums(products, x_sums, scale, offset, places, mask, OFFSETS: tl.constexpr, AXIS: tl.constexpr):
    """A group's products with its scale and offset: (.., lines, rows); ``places`` (.., lines) of both in memory."""
    scales = tl.load(scale + places, mask=mask, other=0.0).to(tl.float32)
    if OFFSETS == ZERO_POINT:
        zeros = tl.load(offset + places, mask=mask, other=0).to(tl.float32)
        products -= tl.expand_dims(zeros, AXIS) * tl.expand_dims(x_sums, AXIS - 1)
    products *= tl.expand_dims(scales, AXIS)
    if OFFSETS == OFFSET:
        shifts = tl.load(offset + places, mask=mask, other=0.0).to(tl.float32)
        products += tl.expand_dims(shifts, AXIS) * tl.expand_dims(x_sums, AXIS - 1)
    return products


@triton.jit
def narrow_product(
    x_rows,
    valid,
    code_lines,
    line,
    lines,
    scale,
    offset,
    levels,
    books,
    book_size,
    start,
    end,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSETS: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
):
    """(BLOCK_N, BLOCK_M) float32 over ``start .. end`` of the depth, whose blocks are PARTS units, one a warp or more.

    ``x_rows`` (BLOCK_M,) and ``code_lines`` (BLOCK_N,) point at the beginning of rows.
    """
    two: tl.constexpr = (FORMAT == HALVES) | (FORMAT == LEVELS)
    size: tl.constexpr = UNIT // 2 if two else UNIT
    value_type: tl.constexpr = x_rows.dtype.element_ty
    unit = tl.arange(0, PARTS) * UNIT
    inner = tl.arange(0, size)
    x_place = unit[:, None, None] + inner[None, None, :]
    x_at = x_rows[None, :, None] + x_place
    code_place = (tl.arange(0, PARTS) * size)[:, None, None] + inner[None, None, :]
    codes_at = code_lines[None, :, None] + code_place
    valid_rows = valid[None, :, None]
    sums = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(start, end, UNIT * PARTS, num_stages=STAGES):
        first = k // 2 if two else k
        inside = unit + k < end
        if EVEN:
            packed = tl.load(codes_at + first)
            left = tl.load(x_at + k, mask=valid_rows, other=0.0)
        else:
            packed = tl.load(codes_at + first, mask=inside[:, None, None], other=0)
            left = tl.load(x_at + k, mask=valid_rows & (x_place + k < depth), other=0.0)
        products = sums if GROUP == 0 else tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
        if two:
            if EVEN:
                right = tl.load(x_at + (k + size), mask=valid_rows, other=0.0)
            else:
                right = tl.load(x_at + (k + size), mask=valid_rows & (x_place + (k + size) < depth), other=0.0)
            if FORMAT == HALVES:
                low, high = halves_of(packed, value_type, ASM)
            else:
                # Past the end of a row its last book will do: the input is zero there.
                book = tl.minimum((unit + k) // book_size, books - 1)[:, None, None]
                low, high = level_values(packed, levels, (line * books)[None, :, None] + book, value_type)
            products = tl.dot(low, tl.permute(left, (0, 2, 1)), products)
            products = tl.dot(high, tl.permute(right, (0, 2, 1)), products)
        else:
            values = values_of(packed, value_type, FORMAT, ASM)
            products = tl.dot(values, tl.permute(left, (0, 2, 1)), products)
        if GROUP == 0:
            sums = products
        else:
            x_sums = unit.to(tl.float32)[:, None]
            if OFFSETS > 0:
                x_sums = tl.sum(left.to(tl.float32), 2)
                if two:
                    x_sums += tl.sum(right.to(tl.float32), 2)
            places = ((unit + k) // GROUP)[:, None] * lines + line[None, :]
            sums += _group_sums(products, x_sums, scale, offset, places, inside[:, None], OFFSETS, 2)
    return tl.sum(sums, 0)


@triton.jit
def wide_product(
    x_rows,
    valid,
    code_lines,
    line,
    lines,
    scale,
    offset,
    levels,
    books,
    book_size,
    order,
    start,
    end,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSETS: tl.constexpr,
    ORDERED: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
):
    """As ``narrow_product``, unit after unit by all warps together. ORDERED: x is read at ``order[k]`` for column k."""
    two: tl.constexpr = (FORMAT == HALVES) | (FORMAT == LEVELS)
    size: tl.constexpr = UNIT // 2 if two else UNIT
    value_type: tl.constexpr = x_rows.dtype.element_ty
    inner = tl.arange(0, size)
    codes_at = code_lines[:, None] + inner[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(start, end, UNIT, num_stages=STAGES):
        packed = tl.load(codes_at + (k // 2 if two else k))
        left = _inputs(x_rows, valid, order, inner + k, depth, ORDERED, EVEN)
        products = sums if GROUP == 0 else tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if two:
            right = _inputs(x_rows, valid, order, inner + (k + size), depth, ORDERED, EVEN)
            if FORMAT == HALVES:
                low, high = halves_of(packed, value_type, ASM)
            else:
                low, high = level_values(packed, levels, (line * books + k // book_size)[:, None], value_type)
            products = tl.dot(low, tl.trans(left), products)
            products = tl.dot(high, tl.trans(right), products)
        else:
            values = values_of(packed, value_type, FORMAT, ASM)
            products = tl.dot(values, tl.trans(left), products)
        if GROUP == 0:
            sums = products
        else:
            x_sums = valid.to(tl.float32)
            if OFFSETS > 0:
                x_sums = tl.sum(left.to(tl.float32), 1)
                if two:
                    x_sums += tl.sum(right.to(tl.float32), 1)
            places = k // GROUP * lines + line
            sums += _group_sums(products, x_sums, scale, offset, places, line < lines, OFFSETS, 1)
    return sums


@triton.jit
def _inputs(x_rows, valid, order, place, depth, ORDERED: tl.constexpr, EVEN: tl.constexpr):
    """(rows, places) of x, zero past the depth."""
    taken = tl.load(order + place, mask=place < depth, other=0) if ORDERED else place
    if EVEN:
        return tl.load(x_rows[:, None] + taken[None, :], mask=valid[:, None], other=0.0)
    return tl.load(x_rows[:, None] + taken[None, :], mask=valid[:, None] & (place < depth)[None, :], other=0.0)


@triton.jit(do_not_specialize=["rows"])
def quantized_kernel(
    x,
    codes,
    factor,
    scale,
    offset,
    levels,
    row_scale,
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
    padded,
    books,
    book_size,
    x_stride,
    residual_stride,
    rows,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    WARPS: tl.constexpr,
    EARLY: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSETS: tl.constexpr,
    ROUNDED: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
    HANDED: tl.constexpr,
    HANDED_BLOCK: tl.constexpr,
    NEXT: tl.constexpr,
):
    """Grid (tiles of BLOCK_M rows, tiles of BLOCK_N lines, SPLITS); several tiles of rows are not split.

    The layout is that of ``quantized_layout``. ROUNDED: x holds codes, ``row_scale`` what each row's stand for.
    PREFETCH: bytes of each line that the L2 cache is asked for before x is there. PARTS 0: ``wide_product``. HANDED and
    NEXT as in ``skinny_kernel``.
    """
    two: tl.constexpr = (FORMAT == HALVES) | (FORMAT == LEVELS)
    tile, split = tl.program_id(1), tl.program_id(2)
    if EARLY:
        tl_cuda.gdc_launch_dependents()
    block: tl.constexpr = UNIT if PARTS == 0 else UNIT * PARTS
    chunk = tl.cdiv(tl.cdiv(padded, block), SPLITS) * block
    start = split * chunk
    end = tl.minimum(start + chunk, padded)
    line_bytes = padded // 2 if two else padded
    line = tile_line(tile, tl.arange(0, BLOCK_N), lines, BLOCK_N, GATED)
    code_lines = codes + line.to(tl.int64) * line_bytes
    if PREFETCH > 0:
        thread, each = tl.arange(0, 32 * WARPS), BLOCK_N // WARPS
        own = tile_line(tile, thread // 32 * each + thread % each, lines, BLOCK_N, GATED)
        prefetch(codes + own.to(tl.int64) * line_bytes + (start // 2 if two else start), PREFETCH)
    if EARLY:
        tl_cuda.gdc_wait()

    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < rows
    width: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    columns = lines // 2 if GATED else lines
    column = tile * width + tl.arange(0, width)
    mask = valid[:, None] & (column < columns)[None, :]
    x_rows = x + row.to(tl.int64) * x_stride
    handed = load_handed(handed_squares, row, valid, HANDED, HANDED_BLOCK)
    if PARTS == 0:
        sums = wide_product(
            x_rows, valid, code_lines, line, lines, scale, offset, levels, books, book_size, x, start, end, depth,
            BLOCK_M, BLOCK_N, UNIT, STAGES, FORMAT, GROUP, OFFSETS, False, EVEN, ASM,
        )  # fmt: skip
    else:
        sums = narrow_product(
            x_rows, valid, code_lines, line, lines, scale, offset, levels, books, book_size, start, end, depth,
            BLOCK_M, BLOCK_N, UNIT, PARTS, STAGES, FORMAT, GROUP, OFFSETS, EVEN, ASM,
        )  # fmt: skip
    sums = tl.trans(sums)
    last, squares = True, valid.to(tl.float32)
    if SPLITS > 1:
        sums, squares, last = sum_splits(
            sums, squares, partials, counters, tile, split, BLOCK_M, BLOCK_N, SPLITS, False
        )
    if last:
        sums *= tl.load(factor + line)[None, :]
        if ROUNDED:
            sums *= tl.load(row_scale + row, mask=valid, other=0.0)[:, None]
        shifts = tl.load(bias + line) if BIAS else 0.0
        place = row.to(tl.int64)[:, None]
        added = 0.0
        if RESIDUAL:
            added = tl.load(residual + place * residual_stride + column[None, :], mask=mask, other=0.0)
        place = place * columns + column[None, :]
        hidden = finish(
            sums, squares, handed, shifts, added, output + place, mask, depth, eps,
            BLOCK_M, BLOCK_N, False, HANDED, BIAS, GATED, RESIDUAL,
        )  # fmt: skip
        if NEXT:
            gains = tl.load(next_gain + column, mask=column < columns, other=0.0)
            squares_place = next_squares + row * tl.num_programs(1) + tile
            hand_over(hidden, gains, next_scaled + place, squares_place, mask, valid)
