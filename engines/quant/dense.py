"""Weights as they are: float32, bfloat16 or float16."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines import kernels
from engines.kernels import Fusion, PackedExperts, PackedLinear, RmsNorm, RoutedBatch, Router
from engines.quant.base import LinearLayout, Split, WeightSource


@dataclass(frozen=True, slots=True)
class DenseWeights:
    weight: torch.Tensor
    """(out, in)."""
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PackedWeights:
    packed: PackedLinear
    bias: torch.Tensor | None


class DenseMethod:
    """The QuantMethod of unquantized weights."""

    def create_weights(self, layout: LinearLayout, source: WeightSource) -> DenseWeights:
        weights = [
            source.take(f"{part.name}.weight", (part.out_features, layout.in_features), layout.split)
            for part in layout.parts
        ]
        return DenseWeights(weights[0] if len(weights) == 1 else torch.cat(weights), self._bias(layout, source))

    def _bias(self, layout: LinearLayout, source: WeightSource) -> torch.Tensor | None:
        if not layout.bias:
            return None
        names = [f"{part.name}.bias" for part in layout.parts]
        if layout.split == "in" and source.rank > 0:
            # The ranks' outputs are summed, so only one of them adds the bias.
            for name in names:
                source.skip(name)
            return None
        split: Split = "out" if layout.split == "out" else "none"
        sizes = [part.out_features for part in layout.parts]
        biases = [source.take(name, (size,), split) for name, size in zip(names, sizes, strict=True)]
        return biases[0] if len(biases) == 1 else torch.cat(biases)

    def finish(self, weights: DenseWeights) -> PackedWeights:
        return PackedWeights(kernels.pack_linear(weights.weight), weights.bias)

    def apply(self, weights: PackedWeights, x: torch.Tensor, fusion: Fusion) -> torch.Tensor:
        return kernels.linear(x, weights.packed, weights.bias, fusion)

    def finish_experts(
        self,
        gate_up: list[DenseWeights],
        down: list[DenseWeights],
        shared: tuple[DenseWeights, DenseWeights],
        experts_per_token: int,
    ) -> PackedExperts:
        return kernels.pack_experts(
            [layer.weight for layer in gate_up],
            [layer.weight for layer in down],
            (shared[0].weight, shared[1].weight),
            experts_per_token,
        )

    def apply_experts(
        self, weights: PackedExperts, hidden: torch.Tensor, norm: RmsNorm, router: Router, batch: RoutedBatch
    ) -> torch.Tensor:
        return kernels.mixture(hidden, norm, router, weights, batch)
