"""Round to nearest: each weight for itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compression.quantize.base import LayerInputs, Scheme
from compression.quantize.grids import ROWS, best_range, by_group, join_rows
from engines.kernels import Float8Matrix, QuantizedMatrix

FLOAT8_LARGEST = 448.0
INT8_LARGEST = 127.0


@dataclass(frozen=True, slots=True)
class RoundToNearest:
    """A ``Quantizer`` for integers and float8. Integer groups get the range with the least squared error, columns
    weighed by their mean squared input where that is known."""

    needs_hessian: bool = False

    def quantize(self, weight: torch.Tensor, inputs: LayerInputs | None, scheme: Scheme) -> QuantizedMatrix:
        """As ``Quantizer``."""
        require_finite(weight)
        if scheme.kind == "float8":
            return _float8(weight, inputs, scheme)
        grids, codes = [], torch.empty_like(weight, dtype=torch.uint8)
        for rows, target in zip(torch.split(weight, ROWS), torch.split(codes, ROWS), strict=True):
            groups = by_group(rows, scheme)
            grids.append(best_range(groups, scheme, importance(inputs, groups)))
            target.copy_(grids[-1].codes(groups).view(rows.shape))
        return join_rows(grids).matrix(codes, scheme, input_scale(inputs, scheme))


def require_finite(weight: torch.Tensor) -> None:
    """Raises ValueError for a weight with NaN or infinite values."""
    if not bool(weight.isfinite().all()):
        raise ValueError("the weight has NaN or infinite values")


def importance(inputs: LayerInputs | None, groups: torch.Tensor) -> torch.Tensor | None:
    """(groups, width): the mean squared input of each column of (out, groups, width) weights; None if not known.

    A column whose input was always zero counts a little, so that its weights are not given up.
    """
    if inputs is None or not inputs.tokens:
        return None
    square = inputs.mean_square
    return square.clamp(min=float(square.mean()) * 1e-3).view(groups.shape[1:])


def input_scale(inputs: LayerInputs | None, scheme: Scheme) -> torch.Tensor | None:
    """() float32: the static scale of a layer's input, from the largest value that calibration saw; None for formats
    whose input's scale is found as it comes. Raises ValueError for a static one without calibration."""
    if not scheme.static_input:
        return None
    if inputs is None or inputs.absmax is None:
        raise ValueError("a static input scale needs calibration")
    largest = FLOAT8_LARGEST if scheme.activations == "float8" else INT8_LARGEST
    scale = (inputs.absmax.amax() / largest).to(scheme.scale_dtype).float()
    return torch.where(scale > 0, scale, 1.0)


def _float8(weight: torch.Tensor, inputs: LayerInputs | None, scheme: Scheme) -> Float8Matrix:
    """Scales of a block bring its largest weight to the largest float8."""
    rows, columns = weight.shape
    block = scheme.block or (1, columns)
    padded = torch.nn.functional.pad(weight, (0, -columns % block[1], 0, -rows % block[0]))
    blocks = padded.view(padded.shape[0] // block[0], block[0], -1, block[1])
    scale = (blocks.abs().amax((1, 3)) / FLOAT8_LARGEST).to(scheme.scale_dtype).float()
    scale = torch.where(scale > 0, scale, 1.0)
    codes = (blocks / scale[:, None, :, None]).clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST).view(padded.shape)
    return Float8Matrix(
        codes=codes[:rows, :columns].to(torch.float8_e4m3fn).contiguous(),
        scale=scale,
        block=block,
        activations=scheme.activations,
        input_scale=input_scale(inputs, scheme),
    )
