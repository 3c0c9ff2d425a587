"""Products with quantized weights on a GPU: activations stay as they are or are rounded as the format says, sums are
float32.

Few rows run one kernel that reads each code once. For many, integer and float8 inputs take the tensor cores' own
products where each line has one scale; otherwise the weight is dequantized some lines at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engines.kernels import backends
from engines.kernels.cuda import TritonKernels
from engines.kernels.cuda.device import machine_at
from engines.kernels.cuda.quantized_layout import BYTES, FLOAT8, DeviceCodes, device_codes
from engines.kernels.matrices import QuantizedMatrix

if TYPE_CHECKING:
    from engines.kernels.cuda.quantized_tuning import QuantizedConfig
    from engines.kernels.linear import Fusion, Handover

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
FEWEST_CODED = 65
"""Rows from which torch multiplies codes by codes; it takes 17 or more."""
FLOAT8_CAPABILITY = (8, 9)
"""Of the first GPUs that have float8 (Ada Lovelace)."""
CODED_MULTIPLE = 16
"""Of a weight's lines and depth, for such products."""


@dataclass(frozen=True, slots=True)
class GpuQuantized:
    """A quantized weight in the layout of the Triton kernels."""

    codes: DeviceCodes

    @property
    def out_features(self) -> int:
        return self.codes.lines

    @property
    def in_features(self) -> int:
        return self.codes.depth

    @property
    def takes_handover(self) -> bool:
        """Whether the input goes into the product as it is, so that its norm can come last."""
        return self.codes.activations == "float" and self.codes.order is None

    def config(self, x: torch.Tensor, fusion: Fusion) -> QuantizedConfig | None:
        """How the kernel of few rows runs; None where this input has to go through ``product``."""
        residual, rows = fusion.residual, x.shape[0]
        triton = backends.triton_for(x) if residual is None else backends.triton_for(x, residual)
        if triton is None or x.dtype not in SIXTEEN_BITS or not rows or self._multiplies_codes(rows):
            return None
        return triton.quantized_config(self.codes, rows, fusion.gated, x.device)

    def handed_tiles(self, x: torch.Tensor, config: QuantizedConfig) -> int:
        """Sums of squares of each row that ``run`` can hand over."""
        triton = backends.shared_triton()
        bfloat16 = x.dtype is torch.bfloat16 and self.takes_handover
        return (
            0 if triton is None or not bfloat16 else triton.handed_quantized_tiles(x.shape[0], self.codes.lines, config)
        )

    def run(
        self,
        x: torch.Tensor,
        config: QuantizedConfig,
        bias: torch.Tensor | None,
        fusion: Fusion,
        handed: Handover | None = None,
        handover: Handover | None = None,
    ) -> torch.Tensor:
        """The layer as ``config`` says. ``handed``: what came of the norm with x; ``handover`` is to be filled."""
        codes, triton = self.codes, backends.shared_triton()
        assert triton is not None
        norm, row_scale = fusion.norm, None
        if handed is not None:
            x = handed.scaled
        else:
            if norm is not None and (codes.activations == "float" or codes.order is not None):
                x, norm = norm(x), None
            x, row_scale = self._input(x, triton, x.dtype, None if norm is None else (norm.weight, norm.eps))
        return triton.quantized_linear(
            x,
            codes,
            config,
            row_scale,
            bias,
            fusion.gated,
            fusion.residual,
            fusion.dtype,
            fusion.into,
            handed,
            handover,
        )

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None, fusion: Fusion) -> torch.Tensor | None:
        config = self.config(x, fusion)
        return None if config is None else self.run(x, config, bias, fusion)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        triton = backends.shared_triton()
        assert triton is not None
        x = x if x.stride(1) == 1 else x.contiguous()
        output = self._many(x, triton)
        return output if bias is None else output.add_(bias)

    def _many(self, x: torch.Tensor, triton: TritonKernels) -> torch.Tensor:
        codes = self.codes
        if not self._multiplies_codes(x.shape[0]):
            values, row_scale = self._input(x, triton, x.dtype)
            if row_scale is None:
                return triton.dequantized_product(values, codes)
            sums = triton.dequantized_product(values[:, : codes.depth], codes, torch.float32)
            return sums.mul_(row_scale.unsqueeze(1)).to(x.dtype)
        if codes.format == BYTES:
            values, row_scale = self._input(x, triton, torch.int8)
            assert row_scale is not None
            sums = torch._int_mm(values, codes.codes.view(torch.int8).t())
            return triton.scale_sums(sums, row_scale, codes.factor, x.dtype)
        values, row_scale = self._input(x, triton, torch.float8_e4m3fn)
        assert row_scale is not None
        weight, by_row, by_line = codes.codes.view(torch.float8_e4m3fn), row_scale.unsqueeze(1), codes.factor[None]
        output = torch._scaled_mm(values, weight.t(), by_row, by_line, out_dtype=torch.bfloat16)
        return output.to(x.dtype)

    def _input(
        self,
        x: torch.Tensor,
        triton: TritonKernels,
        dtype: torch.dtype,
        norm: tuple[torch.Tensor, float] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The input in the order of the codes' columns; where the format rounds it, its codes as numbers of ``dtype``
        and what each row's stand for."""
        codes = self.codes
        if codes.order is not None:
            x = x[:, codes.order]
        if codes.activations == "float":
            return x, None
        return triton.round_rows(x, codes.activations == "float8", codes.input_scale, codes.padded_depth, dtype, norm)

    def _multiplies_codes(self, rows: int) -> bool:
        """Whether so many rows are best multiplied code by code, by torch."""
        codes = self.codes
        formats = {"int8": BYTES, "float8": FLOAT8}
        fits = codes.lines % CODED_MULTIPLE == 0 and codes.padded_depth % CODED_MULTIPLE == 0
        return rows >= FEWEST_CODED and fits and not codes.group and formats.get(codes.activations) == codes.format


def pack_gpu(matrix: QuantizedMatrix) -> GpuQuantized | None:
    """The matrix in the kernels' layout; None where Triton is missing, its kernels cannot take such groups, or the GPU
    cannot round to the format's activations."""
    triton, machine = backends.shared_triton(), machine_at(matrix.codes.device)
    if triton is None:
        return None
    if matrix.activations == "float8" and machine is not None and machine.capability < FLOAT8_CAPABILITY:
        return None
    codes = device_codes(matrix)
    if codes is None:
        return None
    triton.reserve_skinny(codes.codes.device)
    return GpuQuantized(codes)
