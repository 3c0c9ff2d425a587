"""GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one after the other, and what each rounding does to the
layer's output is made good by the columns that are still to come. Scales are then fitted to the codes, and codes are
chosen anew for the fitted scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from compression.quantize.base import LayerInputs, Scheme
from compression.quantize.grids import ROWS, Grid, best_range, by_group, join_rows
from compression.quantize.rounding import importance, input_scale, require_finite
from compression.quantize.scale_fit import fit_scale
from engines.kernels import IntegerMatrix

BLOCK = 128
"""Columns that are rounded before the rest of the matrix is updated."""
MOST_DAMPING = 10.0
ROUNDS = 2
"""Of choosing codes and fitting scales to them."""
LEAST_SHARE = 0.1
"""Of a scale that is left when it is fitted."""


@dataclass(frozen=True, slots=True)
class Gptq:
    """A ``Quantizer``. Columns with the largest inputs go first; groups keep their columns, so that the file needs no
    order of its own."""

    damping: float = 0.1
    """Of the mean of the Hessian's diagonal, added to the diagonal. The paper takes 0.01; more gives up a little of the
    fit to the calibration text, and is nearer on text of another kind."""
    needs_hessian: bool = True

    def quantize(self, weight: torch.Tensor, inputs: LayerInputs | None, scheme: Scheme) -> IntegerMatrix:
        """As ``Quantizer``. Takes two matrices of (in, in) beside the Hessian, one of which stays until the inputs are
        released. Raises ValueError without inputs."""
        require_finite(weight)
        if inputs is None:
            raise ValueError("GPTQ needs calibration")
        order = inputs.mean_square.argsort(descending=True, stable=True)
        factor = inputs.derived.get("inverse factor")
        if factor is None:
            factor = inputs.derived["inverse factor"] = inverse_factor(inputs.hessian, order, self.damping)
        group = order // (scheme.group_size or weight.shape[1])
        grids, codes = [], torch.empty_like(weight, dtype=torch.uint8)
        for rows, target in zip(torch.split(weight, ROWS), torch.split(codes, ROWS), strict=True):
            groups = by_group(rows, scheme)
            grid = best_range(groups, scheme, importance(inputs, groups))
            for _ in range(ROUNDS):
                target[:, order] = _round_columns(rows[:, order], factor, grid, group)
                grid = self._fitted(grid, target, groups, inputs, scheme)
            grids.append(grid)
        return join_rows(grids).matrix(codes, scheme, input_scale(inputs, scheme))

    def _fitted(
        self, grid: Grid, codes: torch.Tensor, weight: torch.Tensor, inputs: LayerInputs, scheme: Scheme
    ) -> Grid:
        """With the scales that are best for (out, in) ``codes``; a scale that would turn around stays as it was."""
        base = codes.view(weight.shape) - grid.zero.unsqueeze(-1)
        scale = fit_scale(weight, base, grid.scale, inputs.hessian, self.damping).to(scheme.scale_dtype).float()
        usable = scale > LEAST_SHARE * grid.scale
        return replace(grid, scale=torch.where(usable, scale, grid.scale))


def inverse_factor(hessian: torch.Tensor, order: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the Hessian, rows and columns in this order.

    Columns without input count as if their inputs were independent and small. Damping grows tenfold until the matrix
    is positive definite. Raises ValueError if it never is.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        return torch.eye(hessian.shape[0], device=hessian.device)
    while damping <= MOST_DAMPING:
        work = hessian[order.unsqueeze(1), order]
        work.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(work)
        if not failed:
            del work
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper: torch.Tensor
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping *= 10
    raise ValueError("the inputs' Hessian is not positive definite, whatever is added to it")


def _round_columns(weight: torch.Tensor, factor: torch.Tensor, grid: Grid, group: torch.Tensor) -> torch.Tensor:
    """(out, in) codes, uint8. ``group``: (in,) of each column; ``weight`` is used up."""
    codes = torch.empty_like(weight, dtype=torch.uint8)
    scale, zero = grid.scale.t()[group], grid.zero.t()[group]
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        # Transposed, a column is contiguous.
        block, own = weight[:, start:end].t().contiguous(), factor[start:end, start:end]
        errors = torch.empty_like(block)
        for index in range(end - start):
            column, step, middle = block[index], scale[start + index], zero[start + index]
            code = (column / step).round_().add_(middle).clamp_(0, (1 << grid.bits) - 1)
            codes[:, start + index] = code.to(torch.uint8)
            error = (column - (code - middle) * step) / own[index, index]
            errors[index] = error
            block[index + 1 :].addr_(own[index, index + 1 :], error, alpha=-1)
        weight[:, end:].addmm_(errors.t(), factor[start:end, end:], alpha=-1)
    return codes
