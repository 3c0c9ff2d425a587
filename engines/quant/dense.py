"""Weights as they are: float32, bfloat16 or float16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from engines import kernels
from engines.kernels import Fusion, PackedLinear
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


@dataclass(frozen=True, slots=True)
class GroupedWeights:
    layers: tuple[PackedLinear, ...]
    """On the CPU: one a layer."""
    stacked: torch.Tensor | None
    """On a GPU: (E, in, out), for one call that never waits for the device."""


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

    def finish_group(self, weights: list[DenseWeights]) -> GroupedWeights:
        if weights[0].weight.device.type == "cpu":
            return GroupedWeights(tuple(kernels.pack_linear(layer.weight) for layer in weights), None)
        return GroupedWeights((), torch.stack([layer.weight for layer in weights]).transpose(1, 2))

    def apply_group(self, weights: GroupedWeights, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        if weights.stacked is not None:
            return functional.grouped_mm(x, weights.stacked, offs=ends)
        output = x.new_empty(x.shape[0], weights.layers[0].out_features)
        start = 0
        for layer, end in zip(weights.layers, ends.tolist(), strict=True):
            if end > start:
                output[start:end] = kernels.linear(x[start:end], layer)
            start = end
        return output
