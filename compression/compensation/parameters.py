"""What of a quantized matrix can be tuned, as a function that gradients pass through rounding in."""

from __future__ import annotations

from dataclasses import replace

import torch

from engines.kernels import IntegerMatrix, QuantizedMatrix

WITHIN_CELL = 0.3
"""How far from its code a weight may begin, in codes: rounding gives that code."""
LEAST_GAIN = 0.01


def straight_through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """``rounded``, with x's gradient (Bengio et al. 2013, arXiv 1308.3432)."""
    return x + (rounded - x).detach()


class TunedMatrix:
    """A quantized matrix whose scales, and where they are given whose codes, are parameters.

    Scales are those of the matrix times ``gain``, rounded to what the file stores. Zero points stay: they are whole
    numbers, and a step of one is too coarse to follow a gradient.
    """

    def __init__(self, matrix: QuantizedMatrix, scale_dtype: torch.dtype, exact: torch.Tensor | None = None) -> None:
        """``exact``: the (out, in) weight before it was rounded; with it the codes of integers are parameters too, and
        begin as near to it as the code that was chosen allows."""
        self._matrix = matrix
        self._dtype = scale_dtype
        self._zero: torch.Tensor | None = None
        """(out, groups)."""
        scale = _scale(matrix)
        if isinstance(matrix, IntegerMatrix):
            middle = torch.full_like(scale, float(1 << matrix.bits - 1))
            self._zero = middle if matrix.offset is None else (-matrix.offset / scale).round()
        self.gain = torch.ones_like(scale).requires_grad_()
        self.latent: torch.Tensor | None = None
        """(out, in) weights in units of codes."""
        if exact is not None and isinstance(matrix, IntegerMatrix) and self._zero is not None:
            codes = matrix.codes.float()
            wanted = exact.view(*scale.shape, -1) / scale.unsqueeze(-1) + self._zero.unsqueeze(-1)
            within = wanted.view(codes.shape).clamp(codes - WITHIN_CELL, codes + WITHIN_CELL)
            self.latent = within.requires_grad_()

    def weight(self) -> torch.Tensor:
        """(out, in) float32, as the file will have it."""
        scaled = self._scaled()
        matrix, scale = self._matrix, _scale(scaled)
        if not isinstance(matrix, IntegerMatrix) or self.latent is None or self._zero is None:
            return scaled.dequantize()
        codes = self.latent.clamp(0, (1 << matrix.bits) - 1)
        codes = straight_through(codes, codes.detach().round())
        values = (codes.view(*scale.shape, -1) - self._zero.unsqueeze(-1)) * scale.unsqueeze(-1)
        return values.view(matrix.codes.shape)

    @torch.no_grad()
    def finished(self) -> QuantizedMatrix:
        """With the parameters as they are now."""
        scaled = self._scaled()
        if isinstance(scaled, IntegerMatrix) and self.latent is not None:
            return replace(scaled, codes=self.latent.round().clamp(0, (1 << scaled.bits) - 1).to(torch.uint8))
        return scaled

    def _scaled(self) -> QuantizedMatrix:
        exact = _scale(self._matrix) * self.gain.clamp(min=LEAST_GAIN)
        scale = straight_through(exact, exact.detach().to(self._dtype).float())
        if isinstance(self._matrix, IntegerMatrix):
            offset = None if self._matrix.offset is None or self._zero is None else -self._zero * scale
            return replace(self._matrix, scale=scale, offset=offset)
        return replace(self._matrix, scale=scale)


def _scale(matrix: QuantizedMatrix) -> torch.Tensor:
    scale = matrix.scale
    if scale is None:
        raise ValueError("a codebook without scales has nothing to tune")
    return scale
