"""Codebooks: one set of levels a layer, placed by k-means where weights are many and matter, and a scale a group.

Columns are weighed by their mean squared input, the diagonal of the Hessian, as SqueezeLLM weighs weights by their
sensitivity (Kim et al., arXiv 2306.07629). SqueezeLLM has levels for each row; levels that a layer shares cost nothing,
and what they save pays for the scales. Scales have signs, so that a group's largest weight is always at one end, as in
BOF4-S (Blumenberg et al., arXiv 2505.06653). With the whole Hessian, codes are chosen as GPTQ does, each rounding made
good by the columns that follow, and scales are then fitted to the layer's output.

Shapes: (out, groups, width) for weights seen by group, (out, groups) for scales, (levels,) for a codebook.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compression.quantize.base import LayerInputs, Scheme
from compression.quantize.gptq import BLOCK, inverse_factor
from compression.quantize.grids import ROWS, by_group
from compression.quantize.rounding import importance, require_finite
from compression.quantize.scale_fit import fit_scale
from engines.kernels import CodebookMatrix

SAMPLE = 1 << 17
"""Weights of a layer that its levels are placed by."""
STEPS = 50
"""Of k-means for given scales."""
ROUNDS_OF_LEVELS = 8
"""Of placing levels and fitting scales, after which they hardly move."""
SCALE_STEPS = 3
"""Of choosing codes and scales in turn, once the levels are found."""
REACHES = (1.1, 1.0, 0.9, 0.8)
"""Scales that are tried for a group, of the one that brings its largest weight to the last level."""
ROUNDS = 2
"""Of choosing codes and fitting scales."""


@dataclass(frozen=True, slots=True)
class KMeans:
    """A ``Quantizer`` for codebooks."""

    damping: float = 0.1
    """As ``Gptq``; more, as scales are fitted to the inputs too, and would otherwise follow the calibration text."""
    needs_hessian: bool = True

    def quantize(self, weight: torch.Tensor, inputs: LayerInputs | None, scheme: Scheme) -> CodebookMatrix:
        """As ``Quantizer``, with the memory that ``Gptq`` takes. Without inputs each weight gets the nearest level."""
        require_finite(weight)
        groups = by_group(weight, scheme)
        seen = inputs if inputs is not None and inputs.tokens else None
        weighed = importance(seen, groups)
        levels = place_levels(groups[:: -(-weight.numel() // SAMPLE)], weighed, scheme.bits)
        codes, scales = torch.empty_like(weight, dtype=torch.uint8), []
        for rows, target in zip(torch.split(groups, ROWS), torch.split(codes, ROWS), strict=True):
            scale = _stored(best_scale(rows, weighed, levels), scheme.scale_dtype)
            if seen is None:
                target.copy_(_nearest(rows, scale, levels).view(target.shape))
            else:
                scale = self._with_feedback(rows, scale, levels, seen, scheme, target)
            scales.append(scale)
        books = levels.expand(weight.shape[0], 1, -1)
        return CodebookMatrix(codes, scheme.bits, books, scale=torch.cat(scales))

    def _with_feedback(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        levels: torch.Tensor,
        inputs: LayerInputs,
        scheme: Scheme,
        codes: torch.Tensor,
    ) -> torch.Tensor:
        """Fill (out, in) ``codes``; returns the scales that go with them."""
        order = inputs.mean_square.argsort(descending=True, stable=True)
        factor = inputs.derived.get("inverse factor of k-means")
        if factor is None:
            factor = inverse_factor(inputs.hessian, order, self.damping)
            inputs.derived["inverse factor of k-means"] = factor
        flat, group = weight.reshape(codes.shape), order // weight.shape[2]
        for _ in range(ROUNDS):
            codes[:, order] = _choose_codes(flat[:, order], factor, scale.t()[group], levels)
            base = levels[codes.long()].view(weight.shape)
            scale = _stored(fit_scale(weight, base, scale, inputs.hessian, self.damping), scheme.scale_dtype)
        return scale


def place_levels(weight: torch.Tensor, importance: torch.Tensor | None, bits: int) -> torch.Tensor:
    """(2 ** bits,) levels in ascending order, exact in float16: k-means on the weights, with scales fitted in turn.

    ``importance`` (groups, width) weighs the columns; None: all count the same.
    """
    share = torch.ones_like(weight) if importance is None else importance.expand_as(weight)
    scale = _largest(weight)
    levels = torch.linspace(-1, 1, 1 << bits, device=weight.device)
    for _ in range(ROUNDS_OF_LEVELS):
        wide = scale.unsqueeze(-1)
        levels = kmeans((weight / wide).flatten(), (share * wide.square()).flatten(), levels)
        scale = _least_squares(weight, share, levels[_nearest(weight, scale, levels)], scale)
    return (levels / levels.abs().amax().clamp(min=1e-12)).half().float()


def kmeans(values: torch.Tensor, share: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Lloyd's algorithm for (N,) values, each weighed by its ``share``, from ascending ``levels`` on.

    On a line a level's values are neighbours, so that running sums over the sorted values give all means. A level that
    no value is nearest to stays where it is.
    """
    values, order = values.double().sort()
    share = share.double()[order]
    nothing = share.new_zeros(1)
    mass, moment = torch.cat([nothing, share.cumsum(0)]), torch.cat([nothing, (share * values).cumsum(0)])
    found = levels.double()
    for _ in range(STEPS):
        cuts = torch.searchsorted(values, (found[1:] + found[:-1]) / 2)
        cuts = torch.nn.functional.pad(cuts, (1, 0))
        ends = torch.cat([cuts[1:], cuts.new_full((1,), values.shape[0])])
        weighed = mass[ends] - mass[cuts]
        found = torch.where(weighed > 0, (moment[ends] - moment[cuts]) / weighed, found)
    return found.to(levels.dtype)


def best_scale(weight: torch.Tensor, importance: torch.Tensor | None, levels: torch.Tensor) -> torch.Tensor:
    """(out, groups): the scales with the least squared error among those that are tried."""
    share = torch.ones_like(weight) if importance is None else importance.expand_as(weight)
    largest = _largest(weight)
    best, least = largest, torch.full_like(largest, torch.inf)
    for reach in REACHES:
        scale = largest * reach
        for _ in range(SCALE_STEPS):
            scale = _least_squares(weight, share, levels[_nearest(weight, scale, levels)], scale)
        values = levels[_nearest(weight, scale, levels)] * scale.unsqueeze(-1)
        error = ((values - weight).square() * share).sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _largest(weight: torch.Tensor) -> torch.Tensor:
    """(out, groups): each group's largest weight, with its sign; next to nothing for a group of zeros."""
    largest = weight.gather(-1, weight.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return torch.where(largest == 0, 1e-30, largest)


def _nearest(weight: torch.Tensor, scale: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """(out, groups, width) codes, int64."""
    return torch.bucketize(weight / scale.unsqueeze(-1), (levels[1:] + levels[:-1]) / 2)


def _least_squares(weight: torch.Tensor, share: torch.Tensor, base: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The best scales for these levels of the weights; ``scale`` where they would be zero."""
    fitted = (share * base * weight).sum(-1) / (share * base.square()).sum(-1).clamp(min=1e-30)
    return torch.where(fitted.abs() > scale.abs() * 1e-3, fitted, scale)


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As the file will have it: nothing is divided by zero."""
    tiny = torch.finfo(dtype).tiny
    rounded = scale.to(dtype).float()
    return torch.where(rounded.abs() >= tiny, rounded, tiny)


def _choose_codes(
    weight: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, levels: torch.Tensor
) -> torch.Tensor:
    """(out, in) codes, uint8, as GPTQ chooses them. ``scale``: (in, out) of each column; ``weight`` is used up."""
    codes = torch.empty_like(weight, dtype=torch.uint8)
    middles = (levels[1:] + levels[:-1]) / 2
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        # Transposed, a column is contiguous.
        block, own = weight[:, start:end].t().contiguous(), factor[start:end, start:end]
        errors = torch.empty_like(block)
        for index in range(end - start):
            column, step = block[index], scale[start + index]
            code = torch.bucketize(column / step, middles)
            codes[:, start + index] = code
            error = (column - levels[code] * step) / own[index, index]
            errors[index] = error
            block[index + 1 :].addr_(own[index, index + 1 :], error, alpha=-1)
        weight[:, end:].addmm_(errors.t(), factor[start:end, end:], alpha=-1)
    return codes
