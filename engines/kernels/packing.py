"""Weights of linear layers in the layouts that ``engines.kernels.linear`` reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from engines.kernels import backends
from engines.kernels.cuda.tuning import WEIGHT_ALIGNMENT
from engines.kernels.matrices import Matrix, stack_rows
from engines.kernels.quantized import QuantizedLinear, pack_quantized


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight in the layout that ``linear`` reads."""

    weight: torch.Tensor
    layout: Literal["plain", "turned", "panels", "onednn"]
    """(out, in) as it is, its transposed view, the native library's panels, or oneDNN's own blocks."""
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class PackedParts:
    """Weights of different formats that share their input; their outputs stand side by side."""

    parts: tuple[PackedLinear | QuantizedLinear, ...]

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features


PackedWeight: TypeAlias = PackedLinear | QuantizedLinear | PackedParts


def pack_linear(*parts: Matrix) -> PackedWeight:
    """(out, in) weights that share their input -> what ``linear`` takes; the caller may drop the weights."""
    stacked = stack_rows(list(parts))
    if stacked is None:
        return PackedParts(tuple(_pack_one(part) for part in parts))
    return _pack_one(stacked)


def _pack_one(matrix: Matrix) -> PackedLinear | QuantizedLinear:
    return pack_dense(matrix) if isinstance(matrix, torch.Tensor) else pack_quantized(matrix)


def pack_dense(weight: torch.Tensor) -> PackedLinear:
    """As ``pack_linear``, of one plain weight."""
    out_features, in_features = weight.shape
    if backends.native is not None and weight.is_cpu and weight.dtype is torch.float32:
        return PackedLinear(backends.native.pack_panels(weight.contiguous()), "panels", out_features, in_features)
    if weight.is_cpu and weight.dtype is torch.bfloat16 and _has_onednn_bfloat16():
        blocks = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        return PackedLinear(blocks, "onednn", out_features, in_features)
    if weight.is_cuda or weight.is_meta:
        if (triton := backends.triton_for(weight)) is not None:
            triton.reserve_skinny(weight.device)
        if weight.data_ptr() % WEIGHT_ALIGNMENT or not weight.is_contiguous():
            weight = weight.clone(memory_format=torch.contiguous_format)
        return PackedLinear(weight.t(), "turned", out_features, in_features)
    return PackedLinear(weight, "plain", out_features, in_features)


def _has_onednn_bfloat16() -> bool:
    """Whether torch can lay out weights for oneDNN once; by itself it does so again in every product."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
