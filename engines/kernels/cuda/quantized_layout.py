"""Quantized weights in the layout that the GPU kernels read.

A row of codes is cut into units of ``unit`` features that lie in one group. Codes of at most 4 bits stand two a byte,
those of a unit's first half in the low and of its second half in the high four bits: a product takes each half with a
contiguous half of the unit's input, and nothing has to be interleaved. Wider codes stand one a byte, in turn.

Scales are (groups, lines), so that lines beside each other lie beside each other, in 16 bits where that is exact: a
line's factor, a power of two, then takes what half precision has no exponent for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from engines.kernels.matrices import Activations, CodebookMatrix, Float8Matrix, IntegerMatrix, QuantizedMatrix

HALVES, BYTES, FLOAT8, LEVELS, DENSE = 0, 1, 2, 3, 4
"""What codes are: integers less 8, two a byte; signed integers; float8 e4m3; numbers of levels, two a byte; the values
themselves, in 16 bits."""
NO_OFFSET, ZERO_POINT, OFFSET = 0, 1, 2
"""What is added to a group's values: nothing, minus an integer times the scale, or any number."""
WIDEST_UNIT = 128
DENSE_UNIT = 64
NARROWEST_UNIT = {HALVES: 32, BYTES: 16, FLOAT8: 16, LEVELS: 32}
"""Half of it, or all of it, is the depth of one matrix instruction and starts at a multiple of 16 bytes."""
HALF_BITS = 4
LEVEL_COUNT = 1 << HALF_BITS


@dataclass(frozen=True, slots=True)
class DeviceCodes:
    """A weight of (lines, depth). Values are ``factor * (scale * codes + offset)``, each by its line and group."""

    codes: torch.Tensor
    """(lines, bytes of a row) uint8, or (lines, depth) of DENSE ones; a row is filled up with zeros where there are
    codes for zero."""
    format: int
    lines: int
    depth: int
    unit: int
    group: int
    """Features that share a scale; 0: a whole line, whose scale is its factor alone."""
    factor: torch.Tensor
    """(lines,) float32."""
    scale: torch.Tensor | None
    """(groups, lines) float16 or float32."""
    offset: torch.Tensor | None
    """(groups, lines): int8 zero points, or float32 offsets before the factor."""
    levels: torch.Tensor | None
    """(lines, books, LEVEL_COUNT) float32, of LEVELS."""
    order: torch.Tensor | None
    """As in ``IntegerMatrix``."""
    activations: Activations
    input_scale: torch.Tensor | None

    @property
    def padded_depth(self) -> int:
        """Features of a row with what fills it up."""
        return self.codes.shape[1] * (2 if self.format in (HALVES, LEVELS) else 1)

    @property
    def offset_kind(self) -> int:
        if self.offset is None:
            return NO_OFFSET
        return ZERO_POINT if self.offset.dtype is torch.int8 else OFFSET

    @property
    def book_size(self) -> int:
        """Features that share levels; 1 where there are none."""
        return 1 if self.levels is None else self.padded_depth // self.books

    @property
    def books(self) -> int:
        """Sets of levels of a line; 1 where there are none."""
        return 1 if self.levels is None else self.levels.shape[1]

    @property
    def weight_bytes(self) -> int:
        parts = (self.codes, self.factor, self.scale, self.offset, self.levels)
        return sum(part.nbytes for part in parts if part is not None)


def device_codes(matrix: QuantizedMatrix) -> DeviceCodes | None:
    """The matrix for the kernels; None for groups that they cannot take."""
    if isinstance(matrix, IntegerMatrix):
        return _pack_integers(matrix)
    return _pack_levels(matrix) if isinstance(matrix, CodebookMatrix) else _pack_float8(matrix)


def dense_codes(weight: torch.Tensor) -> DeviceCodes:
    """A plain weight of 16-bit floats beside quantized ones."""
    return DeviceCodes(
        codes=_padded(weight, DENSE_UNIT, 0),
        format=DENSE,
        lines=weight.shape[0],
        depth=weight.shape[1],
        unit=DENSE_UNIT,
        group=0,
        factor=torch.ones(weight.shape[0], device=weight.device),
        scale=None,
        offset=None,
        levels=None,
        order=None,
        activations="float",
        input_scale=None,
    )


def unit_of(format: int, group: int) -> int | None:
    """The widest unit in a group, 0 for a whole line; None where even the narrowest does not divide it."""
    unit = math.gcd(group, WIDEST_UNIT) if group else WIDEST_UNIT
    return unit if unit >= NARROWEST_UNIT[format] else None


def _pack_integers(matrix: IntegerMatrix) -> DeviceCodes | None:
    groups, depth = matrix.scale.shape[1], matrix.shape[1]
    group = matrix.group_size if groups > 1 else 0
    middle = 1 << matrix.bits - 1
    halves = matrix.bits <= HALF_BITS and unit_of(HALVES, group) is not None
    format = HALVES if halves else BYTES
    unit = unit_of(format, group)
    if unit is None:
        return None
    if halves:
        codes = pack_halves(_padded(matrix.codes + (LEVEL_COUNT // 2 - middle), unit, LEVEL_COUNT // 2), unit)
    else:
        codes = _padded(matrix.codes - middle, unit, 0)
    offset = None
    if matrix.offset is not None:
        offset = _shifted(matrix.scale, matrix.offset, middle)
    if not group and offset is None:
        factor, scale = matrix.scale[:, 0].float().contiguous(), None
    else:
        factor, scale = _narrowed(matrix.scale)
        if offset is not None and offset.dtype is not torch.int8:
            offset = offset / factor.unsqueeze(1)
    return DeviceCodes(
        codes=codes,
        format=format,
        lines=matrix.shape[0],
        depth=depth,
        unit=unit,
        group=group or (codes.shape[1] * (2 if halves else 1) if scale is not None else 0),
        factor=factor,
        scale=None if scale is None else scale.t().contiguous(),
        offset=None if offset is None else offset.t().contiguous(),
        levels=None,
        order=matrix.order,
        activations=matrix.activations,
        input_scale=matrix.input_scale,
    )


def _pack_float8(matrix: Float8Matrix) -> DeviceCodes | None:
    lines, depth = matrix.shape
    columns = matrix.block[1]
    group = columns if columns < depth else 0
    unit = unit_of(FLOAT8, group)
    if unit is None:
        return None
    by_line = matrix.scale.repeat_interleave(matrix.block[0], 0)[:lines]
    if group:
        factor, scale = _narrowed(by_line)
    else:
        factor, scale = by_line[:, 0].contiguous(), None
    return DeviceCodes(
        codes=_padded(matrix.codes.view(torch.uint8), unit, 0),
        format=FLOAT8,
        lines=lines,
        depth=depth,
        unit=unit,
        group=group,
        factor=factor,
        scale=None if scale is None else scale.t().contiguous(),
        offset=None,
        levels=None,
        order=None,
        activations=matrix.activations,
        input_scale=matrix.input_scale,
    )


def _pack_levels(matrix: CodebookMatrix) -> DeviceCodes | None:
    lines, depth = matrix.shape
    books = matrix.codebook.shape[1]
    groups = 1 if matrix.scale is None else matrix.scale.shape[1]
    group = depth // groups if groups > 1 else 0
    unit = unit_of(LEVELS, math.gcd(group, depth // books) if books > 1 else group)
    if matrix.bits > HALF_BITS or unit is None:
        return None
    levels = functional.pad(matrix.codebook, (0, LEVEL_COUNT - matrix.codebook.shape[2]))
    factor, scale = torch.ones(lines, device=levels.device), None
    if matrix.scale is not None:
        factor, scale = (matrix.scale[:, 0].contiguous(), None) if not group else _narrowed(matrix.scale)
    return DeviceCodes(
        codes=pack_halves(_padded(matrix.codes, unit, 0), unit),
        format=LEVELS,
        lines=lines,
        depth=depth,
        unit=unit,
        group=group,
        factor=factor,
        scale=None if scale is None else scale.t().contiguous(),
        offset=None,
        levels=levels.float().contiguous(),
        order=None,
        activations=matrix.activations,
        input_scale=None,
    )


def pack_halves(codes: torch.Tensor, unit: int) -> torch.Tensor:
    """(lines, depth) uint8 below 16 -> (lines, depth / 2)."""
    units = codes.view(codes.shape[0], -1, 2, unit // 2)
    return (units[:, :, 0] | units[:, :, 1] << HALF_BITS).view(codes.shape[0], -1)


def _padded(codes: torch.Tensor, unit: int, code: int) -> torch.Tensor:
    """Rows of whole units."""
    missing = -codes.shape[1] % unit
    return functional.pad(codes, (0, missing), value=code) if missing else codes.contiguous()


def _shifted(scale: torch.Tensor, offset: torch.Tensor, middle: int) -> torch.Tensor:
    """(lines, groups): what codes less ``middle`` have to be added; int8 where all of it are zero points.

    On the meta device, where nothing can be looked at: zero points, which most files have.
    """
    if offset.is_meta:
        return torch.empty_like(offset, dtype=torch.int8)
    zero = (-offset / torch.where(scale == 0, 1.0, scale)).round()
    shifted = zero - middle
    if torch.equal(-zero * scale, offset) and shifted.min() >= -128 and shifted.max() <= 127:
        return shifted.to(torch.int8)
    return offset + middle * scale


def _narrowed(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(lines, groups) float32 -> factors, (lines,), and scales in half precision where both together are exact.

    On the meta device scales are taken for exact.
    """
    if scale.is_meta:
        return torch.empty(scale.shape[0], device=scale.device), torch.empty_like(scale, dtype=torch.float16)
    largest = scale.abs().amax(dim=1)
    _, exponent = torch.frexp(largest)
    factor = torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), 1.0)
    narrow = (scale / factor.unsqueeze(1)).half()
    if torch.equal(narrow.float() * factor.unsqueeze(1), scale):
        return factor, narrow
    return torch.ones_like(factor), scale
