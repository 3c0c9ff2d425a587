"""Products with quantized weights on the CPU: the native library multiplies 8-bit activations by the weights' codes.

Activations are rounded token by token: as the format says where it has 8-bit activations, and for weight-only formats
to 8 bits with one scale for every ``ACTIVATION_BLOCK`` features or fewer, as llama.cpp does. The products inside a
block are exact; ``PlainQuantized`` computes what weight-only formats mean without any rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from engines.kernels import backends
from engines.kernels.matrices import CodebookMatrix, IntegerMatrix, QuantizedMatrix
from engines.kernels.native import PackedCodes
from engines.kernels.native.pages import in_huge_pages

if TYPE_CHECKING:
    from engines.kernels.linear import Fusion

ACTIVATION_BLOCK = 64
"""Most features that share a scale where the format itself leaves activations as they are."""
HALVES, BYTES = 8, 4
"""Features that the library takes in one go from codes of half a byte, and of a byte."""


@dataclass(frozen=True, slots=True)
class NativeQuantized:
    """An integer weight in the native library's layout."""

    codes: PackedCodes
    order: torch.Tensor | None
    """As in ``IntegerMatrix``."""

    @property
    def out_features(self) -> int:
        return self.codes.columns

    @property
    def in_features(self) -> int:
        return self.codes.width

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None, fusion: Fusion) -> torch.Tensor | None:
        native = backends.native
        if native is None or self.order is not None or not backends.fits_native(x):
            return None
        norm, residual = fusion.norm, fusion.residual
        if norm is not None and norm.weight.dtype is not x.dtype:
            return None
        if residual is not None and (residual.dtype is not x.dtype or residual.stride(1) != 1):
            return None
        if fusion.gated and self.codes.columns // 2 % native.panel_width:
            return None
        out_type = fusion.dtype or x.dtype
        if out_type not in (torch.float32, x.dtype):
            return None
        pair = None if norm is None else (norm.weight, norm.eps)
        return native.quantized_linear(x, self.codes, pair, bias, fusion.gated, residual, out_type)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert backends.native is not None
        if self.order is not None:
            x = x[:, self.order]
        known = x if backends.fits_native(x) else x.float().contiguous()
        bias = None if bias is None else bias.to(known.dtype)
        return backends.native.quantized_linear(known, self.codes, None, bias, False, None, known.dtype).to(x.dtype)


def pack_native(matrix: QuantizedMatrix) -> NativeQuantized | None:
    """The matrix in the library's layout; None where the library is missing or cannot multiply by it."""
    if backends.native is None:
        return None
    if isinstance(matrix, CodebookMatrix):
        matrix = as_bytes(matrix)
    if not isinstance(matrix, IntegerMatrix) or matrix.activations == "float8":
        return None
    layout = _layout(matrix)
    if layout is None:
        return None
    step, depth, block = layout
    group = matrix.group_size if matrix.scale.shape[1] > 1 else depth
    fixed = 0.0 if matrix.input_scale is None else float(matrix.input_scale)
    panels, offset = _Panels(backends.native.panel_width), matrix.offset
    return NativeQuantized(
        PackedCodes(
            codes=in_huge_pages(panels.codes(matrix.codes, depth, halves=step == HALVES)),
            scale=in_huge_pages(panels.columns(_narrow(matrix.scale, matrix.offset))),
            offset=None if offset is None else in_huge_pages(panels.columns(_narrow(offset, matrix.scale))),
            width=matrix.shape[1],
            depth=depth,
            columns=matrix.shape[0],
            group=group,
            block=block,
            zero_point=0 if offset is not None else 1 << matrix.bits - 1,
            halves=step == HALVES,
            per_token=matrix.activations == "int8",
            input_scale=fixed,
        ),
        matrix.order,
    )


def _layout(matrix: IntegerMatrix) -> tuple[int, int, int] | None:
    """Features in one go, depth with what fills it up, and features that share an activation's scale."""
    width, group = matrix.shape[1], matrix.group_size
    for step in (HALVES, BYTES) if matrix.bits <= 4 else (BYTES,):
        if group == width:
            whole = step if matrix.activations == "int8" else ACTIVATION_BLOCK
            group = depth = -(-width // whole) * whole
        elif group % step == 0:
            depth = width
        else:
            continue
        return step, depth, group if matrix.activations == "int8" else _block(group, step)
    return None


def _block(group: int, step: int) -> int:
    """The largest part of a group, in steps, that is no wider than ``ACTIVATION_BLOCK``."""
    return max(size for size in range(step, ACTIVATION_BLOCK + 1, step) if group % size == 0)


def as_bytes(matrix: CodebookMatrix) -> IntegerMatrix:
    """Levels rounded to 8 bits of their group's largest, which moves them by less than 0.4 % of it."""
    largest = matrix.codebook.abs().amax(dim=2, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    levels = (matrix.codebook / scale).round() + 128
    grouped = matrix.codes.view(matrix.shape[0], matrix.codebook.shape[1], -1).long()
    codes = levels.to(torch.uint8).gather(2, grouped).view(matrix.shape)
    scale = scale.squeeze(2) if matrix.scale is None else scale.squeeze(2) * matrix.scale
    return IntegerMatrix(codes, 8, scale, activations=matrix.activations)


def _narrow(values: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    """In 16 bits where that changes neither these values nor the others."""
    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(each.to(dtype).float(), each) for each in (values, other) if each is not None):
            return values.to(dtype)
    return values.float()


@dataclass(frozen=True, slots=True)
class _Panels:
    """Splits the output features into panels of the library's width, zero past the last one."""

    width: int

    def codes(self, codes: torch.Tensor, depth: int, halves: bool) -> torch.Tensor:
        """(out, in) -> (panels, depth / 4, width, 4), or (panels, depth / 8, width, 4) with two codes a byte."""
        out, features = codes.shape
        padded = functional.pad(codes, (0, depth - features, 0, -out % self.width))
        if not halves:
            return padded.view(-1, self.width, depth // BYTES, BYTES).transpose(1, 2).contiguous()
        split = padded.view(-1, self.width, depth // HALVES, 2, BYTES)
        joined = split[:, :, :, 0] | split[:, :, :, 1] << 4
        return joined.transpose(1, 2).contiguous()

    def columns(self, values: torch.Tensor) -> torch.Tensor:
        """(out, groups) -> (panels, groups, width)."""
        out, groups = values.shape
        padded = functional.pad(values, (0, 0, 0, -out % self.width))
        return padded.view(-1, self.width, groups).transpose(1, 2).contiguous()
