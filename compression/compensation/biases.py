"""Biases that make good what a compressed layer lacks on average, where the model's config has a key for them."""

from __future__ import annotations

from dataclasses import replace

import torch

from compression.calibrated_layer import LayerWeights
from compression.errors import CompressionError
from compression.recipe import Compensation
from engines.manifest import Manifest
from engines.models.config import DecoderConfig, ModelConfig


def compensated_config(manifest: Manifest, config: ModelConfig, settings: Compensation | None) -> ModelConfig:
    """Of the compressed model. Raises CompressionError for new biases in a model that cannot have them."""
    if settings is None or settings.bias != "new":
        return config
    if manifest.architecture != "llama" or not isinstance(config, DecoderConfig):
        raise CompressionError(
            f"compensation.bias: new is for Llama's architecture alone; a config of {manifest.architecture} has no key "
            "for biases of the feed-forward. Use existing, or none"
        )
    return replace(config, mlp_bias=True)


def has_mlp_bias(config: ModelConfig) -> bool:
    """Whether feed-forwards have biases."""
    return isinstance(config, DecoderConfig) and config.mlp_bias


def add_bias(weights: LayerWeights, index: int, bias: torch.Tensor) -> None:
    """Of decoder layer ``index``'s down_proj, (hidden,). gate_proj and up_proj get zeros where they have none, since
    one key of the config is for all three."""
    place = f"model.layers.{index}.mlp"
    for part in ("gate", "up"):
        width = weights.tensors[f"{place}.{part}_proj.weight"].shape[0]
        weights.tensors.setdefault(f"{place}.{part}_proj.bias", torch.zeros(width, device=bias.device))
    name = f"{place}.down_proj.bias"
    weights.tensors[name] = weights.tensors.get(name, torch.zeros_like(bias)) + bias
