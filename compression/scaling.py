"""The search for input scales: AWQ (Lin et al., arXiv 2306.00978) and SmoothQuant (Xiao et al., arXiv 2211.10438).

Both multiply weights by a power p of their inputs' size before rounding, and divide them by the power 1 - p of their
own size, so that channels that are large already are not made larger. p is the power with which the layers' outputs,
inputs rounded as their format says, come out nearest to the unrounded ones on a sample of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from compression.calibrated_layer import LayerWeights
from compression.folds import Fold
from compression.plan import LayerPlan
from compression.quantize.base import LayerInputs, Scheme
from compression.quantize.grids import by_group, full_range
from engines.kernels.quantized import round_activations

POWERS = tuple(step / 20 for step in range(20))
SAMPLES = 512
"""Input rows that the outputs are compared on."""


def find_scale(
    fold: Fold, weights: LayerWeights, plan: Mapping[str, LayerPlan], rule: Literal["awq", "smoothquant"]
) -> torch.Tensor | None:
    """(in,) float32 for ``apply_fold``; None where nothing was seen, or no scale is better than none.

    Only readers that the plan rounds to integers count.
    """
    readers = [name for name in fold.readers if name in plan and plan[name].scheme.kind == "integer"]
    seen = {name: weights.observers[name] for name in readers if weights.observers[name].tokens}
    if not seen:
        return None
    size = _input_size(list(seen.values()), rule)
    against = _weight_size({name: weights.tensors[f"{name}.weight"] for name in readers}, plan, rule)
    best, least = None, float("inf")
    for power in POWERS:
        scale = _even_rows(_normalised(size.pow(power) / against.clamp(min=1e-5).pow(1 - power if power else 0)), fold)
        error = sum(
            output_error(weights.tensors[f"{name}.weight"], inputs.samples, scale, plan[name].scheme)
            for name, inputs in seen.items()
        )
        if error < least:
            best, least = (scale if power else None), error
    return best


def _input_size(seen: list[LayerInputs], rule: Literal["awq", "smoothquant"]) -> torch.Tensor:
    """(in,): mean or largest size of each channel over all observers that saw the input."""
    distinct = list({id(inputs): inputs for inputs in seen}.values())
    if rule == "smoothquant":
        return torch.stack([inputs.absmax for inputs in distinct if inputs.absmax is not None]).amax(0).clamp(min=1e-5)
    total = sum(inputs.tokens for inputs in distinct)
    mean = torch.stack([inputs.mean_abs * (inputs.tokens / total) for inputs in distinct]).sum(0)
    return mean.clamp(min=1e-5)


def _weight_size(
    readers: Mapping[str, torch.Tensor], plan: Mapping[str, LayerPlan], rule: Literal["awq", "smoothquant"]
) -> torch.Tensor:
    """(in,): each channel's largest weight; for AWQ the mean of its weights, each a share of its group's largest, which
    is what rounding leaves of them."""
    if rule == "smoothquant":
        return torch.stack([weight.abs().amax(0) for weight in readers.values()]).amax(0)
    sums = []
    for name, weight in readers.items():
        groups = by_group(weight.abs(), plan[name].scheme)
        sums.append((groups / groups.amax(-1, keepdim=True).clamp(min=1e-6)).view(weight.shape).sum(0))
    return torch.stack(sums).sum(0) / sum(weight.shape[0] for weight in readers.values())


def _normalised(scale: torch.Tensor) -> torch.Tensor:
    """Around 1, and within what norms of 16 bits can take."""
    return (scale / (scale.amax() * scale.amin()).sqrt()).clamp(1e-3, 1e3)


def _even_rows(scale: torch.Tensor, fold: Fold) -> torch.Tensor:
    """One scale, the geometric mean, for channels that come from the same row."""
    if fold.rows is None:
        return scale
    rows = fold.rows.to(scale.device)
    count = int(rows.max()) + 1
    logs = torch.zeros(count, device=scale.device).index_add_(0, rows, scale.log())
    channels = torch.zeros(count, device=scale.device).index_add_(0, rows, torch.ones_like(scale))
    return (logs / channels.clamp(min=1)).exp()[rows]


def output_error(weight: torch.Tensor, samples: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> float:
    """Summed squared difference of the layer's outputs for (S, in) samples, both sides rounded, from the exact ones."""
    scaled = weight * scale
    groups = by_group(scaled, scheme)
    grid = full_range(groups, scheme)
    matrix = grid.matrix(grid.codes(groups).view(weight.shape), scheme)
    rounded = round_activations(samples / scale, matrix) @ matrix.dequantize().t()
    return float((rounded - samples @ weight.t()).square().sum())
