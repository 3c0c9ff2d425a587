"""Products with quantized weights: which implementation serves a matrix, and the plain definition of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from engines.kernels.matrices import QuantizedMatrix
from engines.kernels.quantized_cpu import pack_native
from engines.kernels.quantized_gpu import pack_gpu

if TYPE_CHECKING:
    from engines.kernels.linear import Fusion

INT8_LARGEST = 127
FLOAT8_LARGEST = 448.0
"""Of float8_e4m3fn."""


class QuantizedLinear(Protocol):
    """A quantized weight in the layout that one implementation reads."""

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None, fusion: Fusion) -> torch.Tensor | None:
        """As ``engines.kernels.linear``; None where this input has to go through ``product``."""

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(T, in) -> (T, out) in x's dtype."""


@dataclass(frozen=True, slots=True)
class PlainQuantized:
    """The definition: the weight is dequantized in every product. Any device, any format, slow."""

    matrix: QuantizedMatrix

    @property
    def out_features(self) -> int:
        return self.matrix.shape[0]

    @property
    def in_features(self) -> int:
        return self.matrix.shape[1]

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None, fusion: Fusion) -> torch.Tensor | None:
        return None

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return quantized_product(x, self.matrix, bias)


def pack_quantized(matrix: QuantizedMatrix) -> QuantizedLinear:
    """The fastest implementation that there is for this matrix on its device."""
    packed = pack_native(matrix) if matrix.codes.is_cpu else pack_gpu(matrix)
    return packed or PlainQuantized(matrix)


def quantized_product(x: torch.Tensor, matrix: QuantizedMatrix, bias: torch.Tensor | None) -> torch.Tensor:
    """(T, in) -> (T, out) in x's dtype: input rounded as the format says, everything else in float32."""
    output = round_activations(x.float(), matrix) @ matrix.dequantize().t()
    if bias is not None:
        output = output + bias.float()
    return output.to(x.dtype)


def round_activations(x: torch.Tensor, matrix: QuantizedMatrix) -> torch.Tensor:
    """(T, in) float32 -> the same, rounded to what the format's activations can express."""
    if matrix.activations == "float":
        return x
    largest = FLOAT8_LARGEST if matrix.activations == "float8" else float(INT8_LARGEST)
    fixed = getattr(matrix, "input_scale", None)
    scale = x.abs().amax(dim=1, keepdim=True) / largest if fixed is None else fixed
    scale = torch.where(scale > 0, scale, 1.0)
    codes = (x / scale).clamp(-largest, largest)
    codes = codes.to(torch.float8_e4m3fn).float() if matrix.activations == "float8" else codes.round()
    return codes * scale
