"""Scales that fit the codes: once these are chosen, the layer's output is linear in the scales.

Shapes: (out, groups, width) for weights seen by group, (out, groups) for scales.
"""

from __future__ import annotations

import torch

FIT_STEPS = 8
"""Of conjugate gradients. Each makes the error smaller, and a row has few scales."""


def fit_scale(
    weight: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor, damping: float
) -> torch.Tensor:
    """The scales with which ``base``, the level of each weight, comes nearest to the layer's output: least squares in
    each row's scales, by conjugate gradients from ``scale`` on."""
    shape = (weight.shape[0], -1)
    ridge = damping * float(hessian.diagonal().mean())

    def spread(factor: torch.Tensor) -> torch.Tensor:
        return (factor.unsqueeze(-1) * base).view(shape)

    def collect(difference: torch.Tensor) -> torch.Tensor:
        curved = torch.addmm(difference, difference, hessian, beta=ridge)
        return (curved.view(base.shape) * base).sum(-1)

    diagonal = (hessian.diagonal() + ridge).view(base.shape[1:])
    inverse = 1 / (diagonal * base.square()).sum(-1).clamp(min=1e-30)
    fitted = scale.clone()
    residual = collect(weight.reshape(shape) - spread(scale))
    direction = inverse * residual
    size = (residual * direction).sum(1, keepdim=True)
    for _ in range(FIT_STEPS):
        change = collect(spread(direction))
        step = size / (direction * change).sum(1, keepdim=True).clamp(min=1e-30)
        fitted += step * direction
        residual -= step * change
        conditioned = inverse * residual
        following = (residual * conditioned).sum(1, keepdim=True)
        direction = conditioned + following / size.clamp(min=1e-30) * direction
        size = following
    return fitted
