"""A decoder layer of which what it was rounded to can be tuned."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from compression.calibrated_layer import LayerWeights
from compression.compensation.parameters import TunedMatrix, straight_through
from compression.compensation.plain_layer import PlainLayer
from compression.plan import LayerPlan
from engines.kernels import QuantizedMatrix
from engines.kernels.quantized import round_activations
from engines.models.config import ModelConfig


class TunedLayer:
    """A decoder layer as a function of its parameters."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        weights: LayerWeights,
        method: Literal["scales", "rounding"] | None,
        plan: dict[str, LayerPlan],
        cos_sin: torch.Tensor,
    ) -> None:
        """``method`` None: nothing is tuned."""
        self._weights = weights
        self._tuned: dict[str, TunedMatrix] = {}
        if method is not None:
            codes = method == "rounding"
            self._tuned = {
                name: TunedMatrix(matrix, plan[name].scheme.scale_dtype, weights.exact[name] if codes else None)
                for name, matrix in weights.quantized.items()
            }
        self.gains = [matrix.gain for matrix in self._tuned.values()]
        self.codes = [matrix.latent for matrix in self._tuned.values() if matrix.latent is not None]
        self.layer = PlainLayer(config, index, cos_sin, self._product, weights.tensors.get)

    def _product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        tuned, matrix = self._tuned.get(name), self._weights.quantized.get(name)
        weight = self._weights.tensors[f"{name}.weight"] if tuned is None else tuned.weight()
        # Attention absorbs kv_b_proj, so that its input is never rounded.
        if matrix is not None and matrix.activations != "float" and not name.endswith(".kv_b_proj"):
            x = straight_through(x, round_activations(x.detach().flatten(0, -2), matrix).view(x.shape))
        return functional.linear(x, weight)

    def keep(self) -> None:
        """The weights are what the parameters say."""
        for name, matrix in self.finished().items():
            self._weights.replace(name, matrix)

    def finished(self) -> dict[str, QuantizedMatrix]:
        """By the linear layer's name, with the parameters as they are now."""
        return {name: matrix.finished() for name, matrix in self._tuned.items()}
