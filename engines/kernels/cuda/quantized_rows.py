"""What stands beside products with codes: rounding of input rows, dequantized weights, scales on whole sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from engines.kernels.cuda.device import starts_early
from engines.kernels.cuda.elementwise import row_warps
from engines.kernels.cuda.launch import Launcher
from engines.kernels.cuda.quantized_codes import HALVES, LEVELS, OFFSET, ZERO_POINT, halves_of, level_values, values_of
from engines.kernels.cuda.quantized_layout import DeviceCodes

DEQUANTIZED_LINES = 16
SCALED_COLUMNS = 1024
MOST_EARLY = 128
"""Rows that are rounded by programs which may start while the kernel before still runs."""


@triton.jit
def round_even(values):
    """To the nearest integer, of two the even one: adding 1.5 * 2**23 leaves no bits behind the point."""
    return (values + 12582912.0) - 12582912.0


@triton.jit
def _round_kernel(
    x,
    gain,
    fixed,
    codes,
    row_scale,
    x_stride,
    width,
    padded,
    eps,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    FIXED: tl.constexpr,
    FLOAT8: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (rows,): a row's codes and scale, padded with zeros. NORM: of the row's norm, rounded as a norm is."""
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    mask = place < width
    values = tl.load(x + row * x_stride + place, mask=mask, other=0.0)
    if NORM:
        gains = tl.load(gain + place, mask=mask, other=0.0).to(tl.float32)
        wide = values.to(tl.float32)
        wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps) * gains
        values = wide.to(x.dtype.element_ty)
    wide = values.to(tl.float32)
    largest: tl.constexpr = 448.0 if FLOAT8 else 127.0
    scale = tl.load(fixed) if FIXED else tl.max(tl.abs(wide), 0) / largest
    scale = tl.where(scale > 0, scale, 1.0)
    scaled = tl.minimum(tl.maximum(tl.div_rn(wide, scale), -largest), largest)
    rounded = scaled.to(tl.float8e4nv).to(tl.float32) if FLOAT8 else round_even(scaled)
    tl.store(codes + row * padded + place, rounded.to(codes.dtype.element_ty), mask=place < padded)
    tl.store(row_scale + row, scale)


@triton.jit(do_not_specialize=["first", "lines"])
def _dequantize_kernel(
    codes,
    factor,
    scale,
    offset,
    levels,
    output,
    all_lines,
    padded,
    depth,
    books,
    book_size,
    first,
    lines,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSETS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid (units of a row, tiles of lines): lines ``first`` and on, in output's type; one rounding, of float32."""
    two: tl.constexpr = (FORMAT == HALVES) | (FORMAT == LEVELS)
    size: tl.constexpr = UNIT // 2 if two else UNIT
    k = tl.program_id(0) * UNIT
    target = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_line = target < lines
    line = tl.minimum(first + target, all_lines - 1)
    line_bytes = padded // 2 if two else padded
    inner = tl.arange(0, size)
    place = line.to(tl.int64)[:, None] * line_bytes + (k // 2 if two else k) + inner[None, :]
    packed = tl.load(codes + place)
    factors = tl.load(factor + line)
    scales = factors
    shifts = factors * 0.0
    if GROUP > 0:
        group = k // GROUP * all_lines + line
        scales = factors * tl.load(scale + group).to(tl.float32)
        if OFFSETS == ZERO_POINT:
            shifts = -tl.load(offset + group).to(tl.float32)
        if OFFSETS == OFFSET:
            shifts = factors * tl.load(offset + group).to(tl.float32)
    to = output + target.to(tl.int64)[:, None] * depth + k + inner[None, :]
    if FORMAT == HALVES:
        low, high = halves_of(packed, tl.bfloat16, ASM)
    elif FORMAT == LEVELS:
        low, high = level_values(packed, levels, (line * books + k // book_size)[:, None], tl.float32)
    else:
        low = values_of(packed, tl.bfloat16, FORMAT, ASM)
        high = low
    _store_values(low, scales, shifts, to, is_line[:, None] & (k + inner < depth)[None, :], OFFSETS)
    if two:
        _store_values(high, scales, shifts, to + size, is_line[:, None] & (k + size + inner < depth)[None, :], OFFSETS)


@triton.jit
def _store_values(values, scales, shifts, to, mask, OFFSETS: tl.constexpr):
    wide = values.to(tl.float32)
    if OFFSETS == ZERO_POINT:
        wide += shifts[:, None]
    wide *= scales[:, None]
    if OFFSETS == OFFSET:
        wide += shifts[:, None]
    tl.store(to, wide.to(to.dtype.element_ty), mask=mask)


@triton.jit
def _scale_kernel(sums, row_scale, factor, output, width, BLOCK: tl.constexpr):
    """Grid (rows, parts of the width): integer sums with their row's and column's scales."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    scales = tl.load(row_scale + row) * tl.load(factor + column, mask=mask, other=0.0)
    result = tl.load(sums + row * width + column, mask=mask, other=0).to(tl.float32) * scales
    tl.store(output + row * width + column, result.to(output.dtype.element_ty), mask=mask)


_round = Launcher(_round_kernel)
_dequantize = Launcher(_dequantize_kernel)
_scale = Launcher(_scale_kernel)


def round_rows(
    x: torch.Tensor,
    float8: bool,
    fixed: torch.Tensor | None,
    padded: int,
    dtype: torch.dtype,
    norm: tuple[torch.Tensor, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, in) -> codes (T, ``padded``) as numbers of ``dtype``, and (T,) float32, what each row's stand for.

    Codes are int8 or float8 e4m3; bfloat16 holds both exactly. ``fixed``: () float32, the one scale of all rows.
    """
    rows, width = x.shape
    codes = torch.empty((rows, padded), dtype=dtype, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    gain, eps = (x, 0.0) if norm is None else norm
    block = triton.next_power_of_2(padded)
    early = rows <= MOST_EARLY and starts_early(x.device)
    _round(
        (rows, 1, 1),
        (x, gain, scale if fixed is None else fixed, codes, scale),
        fixed=(x.stride(0), width, padded),
        free=(eps,),
        constants=(block, norm is not None, fixed is not None, float8, early),
        warps=row_warps(block),
        early=early,
    )
    return codes, scale


def dequantize_lines(codes: DeviceCodes, first: int, output: torch.Tensor) -> None:
    """Lines ``first`` and on of the weight into ``output``, contiguous (lines, depth)."""
    empty = codes.factor
    padded = codes.padded_depth
    _dequantize(
        (padded // codes.unit, triton.cdiv(output.shape[0], DEQUANTIZED_LINES), 1),
        (
            codes.codes,
            codes.factor,
            empty if codes.scale is None else codes.scale,
            empty if codes.offset is None else codes.offset,
            empty if codes.levels is None else codes.levels,
            output,
        ),
        fixed=(codes.lines, padded, codes.depth, codes.books, codes.book_size),
        free=(first, output.shape[0]),
        constants=(
            DEQUANTIZED_LINES,
            codes.unit,
            codes.format,
            codes.group,
            codes.offset_kind,
            not output.is_cpu,
        ),
    )


def scale_sums(sums: torch.Tensor, row_scale: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(T, out) int32 with its row's and column's scales, in ``dtype``."""
    rows, width = sums.shape
    output = torch.empty((rows, width), dtype=dtype, device=sums.device)
    _scale(
        (rows, triton.cdiv(width, SCALED_COLUMNS), 1),
        (sums, row_scale, factor, output),
        fixed=(width,),
        free=(),
        constants=(SCALED_COLUMNS,),
    )
    return output
