"""Where the scale of a linear layer's input channels can go: into the norm before it, or into the rows of the layer
that makes them. Either way the model computes the same, and the result is a plain checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compression.calibrated_layer import LayerWeights
from compression.plan import has_experts
from engines.models.config import DecoderConfig, DeepseekConfig, ModelConfig

GAIN_DTYPE = torch.bfloat16
"""Norms keep values of this type, so that no server rounds them, and scales follow from what became of the norm."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Layers that read one input, and what makes it."""

    readers: tuple[str, ...]
    """Linear layers."""
    norm: str | None = None
    """Name of the norm that makes the input, without ``.weight``."""
    rows_of: str | None = None
    """Otherwise: the linear layer whose rows make it."""
    rows: torch.Tensor | None = None
    """(in,) int64: the row of ``rows_of`` behind each input channel; several channels may come from one row."""
    routers: tuple[str, ...] = ()
    """Names of other tensors, (anything, in), that read the input and are never rounded."""


def attention_folds(config: ModelConfig, index: int) -> list[Fold]:
    """Of decoder layer ``index``, in the order in which the inputs arise."""
    name = f"model.layers.{index}"
    attention = f"{name}.self_attn"
    if isinstance(config, DeepseekConfig):
        return _latent_folds(config, name, attention)
    readers = tuple(f"{attention}.{part}_proj" for part in "qkv")
    values = f"{attention}.v_proj"
    return [
        Fold(readers, norm=f"{name}.input_layernorm"),
        Fold((f"{attention}.o_proj",), rows_of=values, rows=_shared_heads(config)),
    ]


def _shared_heads(config: DecoderConfig) -> torch.Tensor:
    """The value row behind each channel of attention's output: heads of a group attend to the same values."""
    rows = torch.arange(config.kv_heads * config.head_dim).view(config.kv_heads, 1, config.head_dim)
    return rows.expand(-1, config.heads // config.kv_heads, -1).reshape(-1)


def _latent_folds(config: DeepseekConfig, name: str, attention: str) -> list[Fold]:
    first = f"{attention}.q_a_proj" if config.q_lora_rank else f"{attention}.q_proj"
    folds = [Fold((first, f"{attention}.kv_a_proj_with_mqa"), norm=f"{name}.input_layernorm")]
    if config.q_lora_rank:
        folds.append(Fold((f"{attention}.q_b_proj",), norm=f"{attention}.q_a_layernorm"))
    # The values are the last rows of each head.
    width = config.nope_dim + config.value_dim
    rows = torch.arange(config.heads * width).view(config.heads, width)[:, config.nope_dim :].reshape(-1)
    return [
        *folds,
        Fold((f"{attention}.kv_b_proj",), norm=f"{attention}.kv_a_layernorm"),
        Fold((f"{attention}.o_proj",), rows_of=f"{attention}.kv_b_proj", rows=rows),
    ]


def feed_forward_folds(config: ModelConfig, index: int) -> list[Fold]:
    """Of decoder layer ``index``; each expert's inner width has a scale of its own."""
    name = f"model.layers.{index}"
    places = [f"{name}.mlp"]
    routers: tuple[str, ...] = ()
    if isinstance(config, DeepseekConfig) and has_experts(config, index):
        places = [f"{name}.mlp.experts.{expert}" for expert in range(config.moe.experts)]
        places.append(f"{name}.mlp.shared_experts")
        routers = (f"{name}.mlp.gate.weight",)
    readers = tuple(f"{place}.{part}_proj" for place in places for part in ("gate", "up"))
    folds = [Fold(readers, norm=f"{name}.post_attention_layernorm", routers=routers)]
    return folds + [Fold((f"{place}.down_proj",), rows_of=f"{place}.up_proj") for place in places]


def apply_fold(fold: Fold, weights: LayerWeights, scale: torch.Tensor) -> torch.Tensor:
    """Divide the input of the fold's readers by (in,) ``scale``, and multiply their weights by it, in place.

    Channels that come from one row must have one scale. Returns the scale that was applied: where a norm takes it up,
    its gain is rounded to ``GAIN_DTYPE`` first. What observers saw is divided too.
    """
    tensors = weights.tensors
    if fold.norm is not None:
        gain = tensors[f"{fold.norm}.weight"]
        folded = (gain / scale).to(GAIN_DTYPE).float()
        usable = (folded != 0) & (gain != 0)
        scale = torch.where(usable, gain / folded, 1.0)
        gain.copy_(torch.where(usable, folded, gain))
    else:
        producer = f"{fold.rows_of}.weight"
        rows = tensors[producer]
        of_row = torch.ones(rows.shape[0], device=rows.device)
        of_row[slice(None) if fold.rows is None else fold.rows.to(rows.device)] = scale
        rows.div_(of_row.unsqueeze(1))
        if (bias := tensors.get(f"{fold.rows_of}.bias")) is not None:
            bias.div_(of_row)
    for name in (*(f"{reader}.weight" for reader in fold.readers), *fold.routers):
        tensors[name].mul_(scale)
    divided: set[int] = set()
    for reader in fold.readers:
        observer = weights.observers.get(reader)
        if observer is not None and id(observer) not in divided:
            divided.add(id(observer))
            observer.divide(scale)
    return scale
