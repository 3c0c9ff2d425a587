"""The levels that weights are rounded to: scales and zero points of integer formats.

Shapes: (out, groups) for scales and zero points, (out, groups, width) for weights seen by group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compression.quantize.base import Scheme
from engines.kernels import IntegerMatrix

SHRINKS = tuple(1 - step / 40 for step in range(1, 17))
"""Ranges that are tried beside the full one: outliers are cut off where that makes the others' error smaller."""


@dataclass(frozen=True, slots=True)
class Grid:
    """``weight = (code - zero) * scale`` with codes ``0 .. 2 ** bits - 1``."""

    bits: int
    scale: torch.Tensor
    """(out, groups) float32, above 0 and exact in the scheme's ``scale_dtype``."""
    zero: torch.Tensor
    """(out, groups) float32, whole numbers within the codes."""
    symmetric: bool

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """(out, groups, width) -> the nearest codes, float32."""
        codes = (weight / self.scale.unsqueeze(-1)).round_().add_(self.zero.unsqueeze(-1))
        return codes.clamp_(0, (1 << self.bits) - 1)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """(out, groups, width) codes -> weights."""
        return (codes - self.zero.unsqueeze(-1)) * self.scale.unsqueeze(-1)

    def matrix(self, codes: torch.Tensor, scheme: Scheme, input_scale: torch.Tensor | None = None) -> IntegerMatrix:
        """(out, in) codes of any type -> the matrix that they are."""
        return IntegerMatrix(
            codes=codes.to(torch.uint8),
            bits=self.bits,
            scale=self.scale,
            offset=None if self.symmetric else -self.zero * self.scale,
            activations=scheme.activations,
            input_scale=input_scale,
        )


ROWS = 1024
"""Rows of a matrix that are worked on at once: what comes beside the weights stays small."""


def join_rows(grids: list[Grid]) -> Grid:
    """One grid of all rows."""
    first = grids[0]
    scale, zero = torch.cat([grid.scale for grid in grids]), torch.cat([grid.zero for grid in grids])
    return Grid(first.bits, scale, zero, first.symmetric)


def by_group(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """(out, in) -> (out, groups, width), a view. Raises ValueError if the groups do not divide the input's width."""
    width = scheme.group_size or weight.shape[1]
    if weight.shape[1] % width:
        raise ValueError(f"groups of {width} do not divide a width of {weight.shape[1]}")
    return weight.view(weight.shape[0], -1, width)


def full_range(weight: torch.Tensor, scheme: Scheme) -> Grid:
    """The grid that spans all weights of a group. (out, groups, width)."""
    return _grid(weight.amin(-1), weight.amax(-1), scheme)


def best_range(weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None) -> Grid:
    """Of the full grid and narrower ones, for each group the one with the least squared error.

    ``importance`` (groups, width) weighs the columns; None: all count the same.
    """
    low, high = weight.amin(-1), weight.amax(-1)
    best = _grid(low, high, scheme)
    least = _error(weight, best, importance)
    scale, zero = best.scale.clone(), best.zero.clone()
    for shrink in SHRINKS:
        grid = _grid(low * shrink, high * shrink, scheme)
        error = _error(weight, grid, importance)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, grid.scale, scale), torch.where(better, grid.zero, zero)
    return Grid(scheme.bits, scale, zero, scheme.symmetric)


def _grid(low: torch.Tensor, high: torch.Tensor, scheme: Scheme) -> Grid:
    """That spans (out, groups) ``low`` to ``high``; a group of zeros gets scale 1."""
    top = (1 << scheme.bits) - 1
    if scheme.symmetric:
        # The side with one level more than the other is the negative one.
        scale = torch.maximum(high / (top // 2), -low / (top // 2 + 1))
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / top
    scale = _stored(scale, scheme.scale_dtype)
    middle = torch.full_like(scale, float(top // 2 + 1))
    zero = middle if scheme.symmetric else (-low / scale).round().clamp(0, top)
    return Grid(scheme.bits, scale, zero, scheme.symmetric)


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As the file will have it; 1 where nothing but zeros is to be expressed, or less than the type can."""
    rounded = scale.to(dtype).float()
    return torch.where(rounded > torch.finfo(dtype).tiny, rounded, 1.0)


def _error(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> torch.Tensor:
    """(out, groups)."""
    difference = grid.values(grid.codes(weight)).sub_(weight).square_()
    return (difference if importance is None else difference.mul_(importance)).sum(-1)
