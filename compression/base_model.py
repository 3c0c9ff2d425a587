"""The model that is compressed: its tensors in float32, read one at a time."""

from __future__ import annotations

import torch

from compression.plan import LinearLayer
from engines.kernels import Matrix, dense
from engines.manifest import Manifest
from engines.models.config import ModelConfig, parse_config
from engines.models.loader import open_weights
from engines.models.weights import FileSource, Placement
from engines.quant.base import LinearPart
from engines.quantization import EMBEDDING_LAYER, HEAD_LAYER

FINAL_NORM = "model.norm.weight"


class BaseModel:
    """Any checkpoint that the engine loads, quantized ones too: they are dequantized as the engine defines it."""

    def __init__(self, manifest: Manifest, device: torch.device) -> None:
        """Raises EngineLoadError for a model that is not supported."""
        self.manifest = manifest
        self.config: ModelConfig = parse_config(manifest)
        self.device = device
        reader, self._methods = open_weights(manifest)
        placement = Placement(device=device, dtype=torch.float32)
        self._source = FileSource(placement, reader, lambda progress: None, total=1)
        self._shapes = reader.shapes

    def tensor(self, name: str) -> torch.Tensor:
        """One stored tensor in float32. Raises EngineLoadError if it is missing."""
        return self._source.take(name, self._shapes.get(name, ()), "none")

    def outer_layers(self) -> list[LinearLayer]:
        """The embedding, and the head where it is not the same."""
        vocab, hidden = self.config.vocab, self.config.hidden
        names = [EMBEDDING_LAYER] if self.config.tied_head else [EMBEDDING_LAYER, HEAD_LAYER]
        return [LinearLayer(name, vocab, hidden) for name in names]

    def linear(self, layer: LinearLayer) -> torch.Tensor:
        """(out, in): a linear layer's weight, dequantized where it is stored quantized."""
        return dense(self.matrix(layer), torch.float32)

    def matrix(self, layer: LinearLayer) -> Matrix:
        """A linear layer's weight as it is stored."""
        part = LinearPart(layer.name, layer.out_features)
        return self._methods(layer.name).create_weights(part, layer.in_features, "none", self._source)

    def layer_tensors(self, index: int, linears: list[LinearLayer]) -> dict[str, torch.Tensor]:
        """All tensors of a decoder layer by name, linear layers as ``NAME.weight``. ``linears``: those of the layer."""
        return {f"{layer.name}.weight": self.linear(layer) for layer in linears} | self.other_tensors(index, linears)

    def other_tensors(self, index: int, linears: list[LinearLayer]) -> dict[str, torch.Tensor]:
        """As ``layer_tensors``, without the weights of linear layers."""
        tensors: dict[str, torch.Tensor] = {}
        parts = [LinearPart(layer.name, layer.out_features) for layer in linears]
        stored = {name for part in parts for name in self._methods(part.name).tensor_names(part)}
        prefix = f"model.layers.{index}."
        for name in self._shapes:
            if name.startswith(prefix) and name not in stored and not name.endswith(".rotary_emb.inv_freq"):
                tensors[name] = self.tensor(name)
        return tensors
