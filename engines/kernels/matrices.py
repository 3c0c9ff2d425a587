"""Weights as the formats give them, before they are packed for a device: a plain tensor, or codes with their scales.

Every class defines its values by ``dequantize``; what a kernel computes is compared with that.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, TypeAlias

import torch

Activations: TypeAlias = Literal["float", "int8", "float8"]
"""What the layer's input is rounded to before the product: nothing, or symmetric codes with one scale for each token
(of the layer's whole input where a matrix has an ``input_scale``)."""


@dataclass(frozen=True, slots=True)
class IntegerMatrix:
    """``weight[o, order[i]] = codes[o, i] * scale[o, i // group] + offset[o, i // group]``, computed in float32."""

    codes: torch.Tensor
    """(out, in) uint8, each below ``2 ** bits``."""
    bits: int
    """1 to 8."""
    scale: torch.Tensor
    """(out, groups) float32; groups are equally wide and divide the input's width."""
    offset: torch.Tensor | None = None
    """(out, groups) float32; None: symmetric, the values are ``(codes - 2 ** (bits - 1)) * scale``."""
    order: torch.Tensor | None = None
    """(in,) int64: the input feature that belongs to each column of codes, where columns were sorted by group."""
    activations: Activations = "float"
    input_scale: torch.Tensor | None = None
    """() float32: of the input, fixed at calibration; None: of each token, as it comes."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantize(self) -> torch.Tensor:
        """(out, in) float32."""
        codes = self.codes.view(self.codes.shape[0], self.scale.shape[1], -1).float()
        if self.offset is None:
            values = (codes - (1 << self.bits - 1)) * self.scale.unsqueeze(-1)
        else:
            values = codes * self.scale.unsqueeze(-1) + self.offset.unsqueeze(-1)
        values = values.view(self.codes.shape)
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy_(1, self.order, values)


@dataclass(frozen=True, slots=True)
class Float8Matrix:
    """``weight[o, i] = codes[o, i] * scale[o // block[0], i // block[1]]``, computed in float32."""

    codes: torch.Tensor
    """(out, in) float8_e4m3fn."""
    scale: torch.Tensor
    """(blocks of rows, blocks of columns) float32; the last block of an axis may be cut."""
    block: tuple[int, int]
    """Rows and columns that share a scale: (out, in) for one scale, (1, in) for one an output row."""
    activations: Activations = "float"
    input_scale: torch.Tensor | None = None
    """() float32: of the input, fixed at calibration; None: of each token, as it comes."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> torch.Tensor:
        """(out, in) float32."""
        rows, columns = self.codes.shape
        scale = self.scale.repeat_interleave(self.block[0], 0)[:rows].repeat_interleave(self.block[1], 1)[:, :columns]
        return self.codes.float() * scale


@dataclass(frozen=True, slots=True)
class CodebookMatrix:
    """``weight[o, i] = codebook[o, i // book, codes[o, i]] * scale[o, i // group]``, computed in float32: freely placed
    levels instead of an even grid."""

    codes: torch.Tensor
    """(out, in) uint8, each below ``2 ** bits``."""
    bits: int
    codebook: torch.Tensor
    """(out, books, 2 ** bits) float32; one book a row where there are scales."""
    activations: Activations = "float"
    scale: torch.Tensor | None = None
    """(out, groups) float32, of either sign; None: 1."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Columns that share a codebook and a scale."""
        return self.codes.shape[1] // (self.codebook if self.scale is None else self.scale).shape[1]

    def dequantize(self) -> torch.Tensor:
        """(out, in) float32."""
        grouped = self.codes.view(self.codes.shape[0], self.codebook.shape[1], -1).long()
        values = self.codebook.gather(2, grouped).view(self.codes.shape)
        if self.scale is None:
            return values
        return (values.view(*self.scale.shape, -1) * self.scale.unsqueeze(-1)).view(self.codes.shape)


QuantizedMatrix: TypeAlias = IntegerMatrix | Float8Matrix | CodebookMatrix
Matrix: TypeAlias = torch.Tensor | QuantizedMatrix


def dense(matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """(out, in) in ``dtype``."""
    return (matrix if isinstance(matrix, torch.Tensor) else matrix.dequantize()).to(dtype)


def matrix_bytes(matrix: Matrix) -> int:
    """Bytes of all its tensors."""
    if isinstance(matrix, torch.Tensor):
        return matrix.nbytes
    parts = (getattr(matrix, field.name) for field in fields(matrix))
    return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))


def take_rows(matrix: QuantizedMatrix, rows: torch.Tensor) -> QuantizedMatrix:
    """The matrix of some rows alone: (R,) int64 numbers of rows, in any order."""
    if isinstance(matrix, CodebookMatrix):
        codes, codebook = matrix.codes.index_select(0, rows), matrix.codebook.index_select(0, rows)
        scale = None if matrix.scale is None else matrix.scale.index_select(0, rows)
        return replace(matrix, codes=codes, codebook=codebook, scale=scale)
    if isinstance(matrix, IntegerMatrix):
        # On the CPU ``codes[rows]`` wakes torch's threads for a few kilobytes, which takes a hundred times as long, and
        # then they wait for more on cores that others need.
        codes, scale = matrix.codes.index_select(0, rows), matrix.scale.index_select(0, rows)
        offset = None if matrix.offset is None else matrix.offset.index_select(0, rows)
        return replace(matrix, codes=codes, scale=scale, offset=offset)
    # A scale for each row: those taken need not be neighbours.
    return replace(
        matrix, codes=matrix.codes[rows], scale=matrix.scale[rows // matrix.block[0]], block=(1, matrix.block[1])
    )


def stack_rows(matrices: list[Matrix]) -> Matrix | None:
    """One matrix whose rows are those of all, in this order; None where their formats differ."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat([each for each in matrices if isinstance(each, torch.Tensor)]) if _same(matrices) else None
    if not _same(matrices):
        return None
    if isinstance(first, IntegerMatrix):
        integers = [each for each in matrices if isinstance(each, IntegerMatrix)]
        offsets = [each.offset for each in integers if each.offset is not None]
        return replace(
            first,
            codes=torch.cat([each.codes for each in integers]),
            scale=torch.cat([each.scale for each in integers]),
            offset=torch.cat(offsets) if offsets else None,
        )
    if isinstance(first, CodebookMatrix):
        books = [each for each in matrices if isinstance(each, CodebookMatrix)]
        scales = [each.scale for each in books if each.scale is not None]
        return replace(
            first,
            codes=torch.cat([each.codes for each in books]),
            codebook=torch.cat([each.codebook for each in books]),
            scale=torch.cat(scales) if scales else None,
        )
    floats = [each for each in matrices if isinstance(each, Float8Matrix)]
    return replace(
        first, codes=torch.cat([each.codes for each in floats]), scale=torch.cat([each.scale for each in floats])
    )


def _same(matrices: list[Matrix]) -> bool:
    """Whether all have one format and may share its per-input parts."""
    keys = [matrix_format(each) for each in matrices]
    return all(key is not None and key == keys[0] for key in keys)


def matrix_format(matrix: Matrix) -> tuple[object, ...] | None:
    """What matrices must have in common to be stacked; None for one that cannot be."""
    if isinstance(matrix, torch.Tensor):
        return ("plain", matrix.dtype)
    if isinstance(matrix, CodebookMatrix):
        groups = 0 if matrix.scale is None else matrix.scale.shape[1]
        return ("codebook", matrix.bits, matrix.codebook.shape[1], groups, matrix.activations)
    if matrix.input_scale is not None:
        return None
    if isinstance(matrix, IntegerMatrix):
        ordered = matrix.order is not None
        return (
            None
            if ordered
            else ("integer", matrix.bits, matrix.scale.shape[1], matrix.offset is None, matrix.activations)
        )
    # Blocks of rows must not straddle two parts.
    whole = matrix.shape[0] % matrix.block[0] == 0 or matrix.block[0] == 1
    return ("float8", matrix.block, matrix.scale.shape[1], matrix.activations) if whole else None
