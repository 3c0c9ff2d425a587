"""One decoder layer of the engine, run on weights that can be watched and replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from compression.quantize.base import LayerInputs
from engines.kernels import Fusion, Matrix, PackedExperts, PackedWeight, QuantizedMatrix
from engines.kernels.quantized import round_activations
from engines.models import decoder, deepseek
from engines.models.config import DeepseekConfig, ModelConfig
from engines.models.layers import ModelBuilder
from engines.models.model import Layer
from engines.quant.base import LinearLayout, Split
from engines.quant.methods import unquantized


@dataclass(slots=True)
class LayerWeights:
    """A decoder layer's weights while it is being compressed. All tensors are float32 on one device."""

    tensors: dict[str, torch.Tensor]
    """By name; a quantized linear layer's ``NAME.weight`` holds its dequantized values."""
    quantized: dict[str, QuantizedMatrix] = field(default_factory=dict)
    """By the linear layer's name."""
    observers: dict[str, LayerInputs] = field(default_factory=dict)
    """By the linear layer's name; layers that share their input share one."""
    taps: dict[str, Callable[[torch.Tensor], None]] = field(default_factory=dict)
    """By the linear layer's name: called with each output of it."""
    keeps_exact: bool = False
    exact: dict[str, torch.Tensor] = field(default_factory=dict)
    """By the linear layer's name: its weight before it was quantized, where ``keeps_exact``."""

    def replace(self, name: str, matrix: QuantizedMatrix) -> None:
        """A linear layer is quantized from here on."""
        if self.keeps_exact:
            self.exact.setdefault(name, self.tensors[f"{name}.weight"])
        self.quantized[name] = matrix
        self.tensors[f"{name}.weight"] = matrix.dequantize()


@dataclass(frozen=True, slots=True)
class CalibratedLinear:
    """A ``QuantizedLinear`` that reads its weights when it is applied."""

    weights: LayerWeights
    names: tuple[str, ...]
    out_features: int
    in_features: int

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None, fusion: Fusion) -> torch.Tensor | None:
        return None

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        observer = self.weights.observers.get(self.names[0])
        if observer is not None:
            observer.observe(x)
        outputs = []
        for name in self.names:
            matrix = self.weights.quantized.get(name)
            rounded = x if matrix is None else round_activations(x, matrix)
            output = rounded @ self.weights.tensors[f"{name}.weight"].t()
            if (tap := self.weights.taps.get(name)) is not None:
                tap(output)
            outputs.append(output)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return output if bias is None else output + bias


class CalibratedPacking:
    """The ``Packing`` that makes every linear layer a ``CalibratedLinear``; notes which layers share an input."""

    def __init__(self, weights: LayerWeights) -> None:
        self._weights = weights
        self.sharing: list[tuple[tuple[str, ...], int]] = []
        """Names of linear layers with one input, and its width."""

    def linear(self, layout: LinearLayout, matrices: list[Matrix]) -> PackedWeight:
        names = tuple(part.name for part in layout.parts)
        self.sharing.append((names, layout.in_features))
        out_features = sum(part.out_features for part in layout.parts)
        return CalibratedLinear(self._weights, names, out_features, layout.in_features)

    def experts(
        self,
        layouts: list[tuple[LinearLayout, LinearLayout]],
        gate_up: list[list[Matrix]],
        down: list[Matrix],
        experts_per_token: int,
    ) -> PackedExperts:
        packed = [(self.linear(wide, []), self.linear(narrow, [])) for wide, narrow in layouts]
        wide, narrow = zip(*packed[:-1], strict=True)
        return PackedExperts(tuple(wide), tuple(narrow), packed[-1], None)


class TensorSource:
    """A ``WeightSource`` over tensors that are already there; they are shared, not copied."""

    rank, world = 0, 1

    def __init__(self, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        self._tensors = tensors
        self.device = device

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        split: Split,
        dtype: torch.dtype | None = None,
        invented: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._tensors[name].view(shape)

    def skip(self, name: str) -> None:
        """Nothing to do: all is taken."""


@dataclass(frozen=True, slots=True)
class CalibratedLayer:
    """A decoder layer that runs on ``LayerWeights``; made anew after norms, routers or biases have changed."""

    layer: Layer
    sharing: list[tuple[tuple[str, ...], int]]


def build_calibrated(
    config: ModelConfig, index: int, weights: LayerWeights, cos_sin: torch.Tensor, device: torch.device
) -> CalibratedLayer:
    """Decoder layer ``index`` on these weights; ``cos_sin`` is the rope table."""
    packing = CalibratedPacking(weights)
    builder = ModelBuilder(TensorSource(weights.tensors, device), unquantized, packing)
    if isinstance(config, DeepseekConfig):
        layer = deepseek.build_layer(config, builder, cos_sin, index)
    else:
        layer = decoder.build_layer(config, builder, cos_sin, index)
    return CalibratedLayer(layer, packing.sharing)
