"""Weights as they are: float32, bfloat16 or float16."""

from __future__ import annotations

import torch

from engines.quant.base import LinearPart, Split, WeightSource


class DenseMethod:
    """The QuantMethod of unquantized weights."""

    def tensor_names(self, part: LinearPart) -> tuple[str, ...]:
        return (f"{part.name}.weight",)

    def create_weights(self, part: LinearPart, in_features: int, split: Split, source: WeightSource) -> torch.Tensor:
        return source.take(f"{part.name}.weight", (part.out_features, in_features), split)
