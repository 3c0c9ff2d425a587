"""One decoder layer in plain torch, through which gradients flow: the engine's own kernels have none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from engines.kernels import RoutingRule
from engines.kernels.experts import route
from engines.kernels.reference import rms_norm
from engines.models.config import DecoderConfig, DeepseekConfig, ModelConfig, MoeConfig
from engines.models.deepseek import LATENT_EPS
from engines.models.rope import softmax_gain

Product = Callable[[str, torch.Tensor], torch.Tensor]
"""A linear layer by its name, without bias: (..., in) -> (..., out)."""
Tensors = Callable[[str], torch.Tensor | None]
"""Any other tensor of the layer by its name; None where the checkpoint has none."""


class PlainLayer:
    """Decoder layer ``index``: computes what the engine's layer does with the same weights."""

    def __init__(
        self, config: ModelConfig, index: int, cos_sin: torch.Tensor, product: Product, tensors: Tensors
    ) -> None:
        """``cos_sin`` is the rope table, (positions, rope_dim) float32."""
        self._config = config
        self._name = f"model.layers.{index}"
        self._index = index
        self._cos_sin = cos_sin
        self._product = product
        self._tensors = tensors

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, hidden) -> the same: the residual stream of whole sequences, before and after."""
        x = self._norm(f"{self._name}.input_layernorm", hidden)
        attention = self._latent if isinstance(self._config, DeepseekConfig) else self._grouped
        hidden = hidden + attention(f"{self._name}.self_attn", x)
        x = self._norm(f"{self._name}.post_attention_layernorm", hidden)
        if isinstance(self._config, DeepseekConfig) and self._index >= self._config.moe.dense_layers:
            return hidden + self._mixture(self._config.moe, f"{self._name}.mlp", x)
        return hidden + self._mlp(f"{self._name}.mlp", x)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        output, bias = self._product(name, x), self._tensors(f"{name}.bias")
        return output if bias is None else output + bias

    def _norm(self, name: str, x: torch.Tensor, eps: float | None = None) -> torch.Tensor:
        return rms_norm(x, self._required(f"{name}.weight"), self._config.eps if eps is None else eps)

    def _required(self, name: str) -> torch.Tensor:
        tensor = self._tensors(name)
        if tensor is None:
            raise KeyError(name)
        return tensor

    def _grouped(self, name: str, x: torch.Tensor) -> torch.Tensor:
        config = self._config
        assert isinstance(config, DecoderConfig)
        queries, keys, values = (_heads(self._linear(f"{name}.{part}_proj", x), config.head_dim) for part in "qkv")
        if config.qk_norm:
            queries, keys = self._norm(f"{name}.q_norm", queries), self._norm(f"{name}.k_norm", keys)
        queries, keys = self._rotate(queries, interleaved=False), self._rotate(keys, interleaved=False)
        return self._linear(f"{name}.o_proj", _attend(queries, keys, values, config.head_dim**-0.5))

    def _latent(self, name: str, x: torch.Tensor) -> torch.Tensor:
        config = self._config
        assert isinstance(config, DeepseekConfig)
        width = config.nope_dim + config.rope.dim
        if config.q_lora_rank:
            query_latents = self._norm(f"{name}.q_a_layernorm", self._linear(f"{name}.q_a_proj", x), LATENT_EPS)
            queries = self._linear(f"{name}.q_b_proj", query_latents)
        else:
            queries = self._linear(f"{name}.q_proj", x)
        plain_queries, turned_queries = torch.split(_heads(queries, width), [config.nope_dim, config.rope.dim], dim=-1)
        latents = self._linear(f"{name}.kv_a_proj_with_mqa", x)
        latents, turned_key = torch.split(latents, [config.kv_lora_rank, config.rope.dim], dim=-1)
        up = self._linear(f"{name}.kv_b_proj", self._norm(f"{name}.kv_a_layernorm", latents, LATENT_EPS))
        up = _heads(up, config.nope_dim + config.value_dim)
        plain_keys, values = torch.split(up, [config.nope_dim, config.value_dim], dim=-1)
        turned_queries, turned_keys = (
            self._rotate(heads, config.rope_interleaved) for heads in (turned_queries, turned_key.unsqueeze(-2))
        )
        queries = torch.cat((plain_queries, turned_queries), dim=-1)
        keys = torch.cat((plain_keys, turned_keys.expand(*plain_keys.shape[:-1], -1)), dim=-1)
        scale = width**-0.5 * softmax_gain(config.rope)
        return self._linear(f"{name}.o_proj", _attend(queries, keys, values, scale))

    def _rotate(self, heads: torch.Tensor, interleaved: bool) -> torch.Tensor:
        """(B, T, H, rope_dim) -> the same."""
        cos, sin = self._cos_sin[: heads.shape[1]].unsqueeze(1).chunk(2, dim=-1)
        if interleaved:
            first, second = heads[..., 0::2], heads[..., 1::2]
            turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
            return turned.flatten(-2)
        first, second = heads.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def _mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gated = functional.silu(self._linear(f"{name}.gate_proj", x)) * self._linear(f"{name}.up_proj", x)
        return self._linear(f"{name}.down_proj", gated)

    def _mixture(self, config: MoeConfig, name: str, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        rule = RoutingRule(
            experts_per_token=config.experts_per_token,
            scoring=config.scoring,
            groups=config.groups,
            top_groups=config.top_groups,
            normalise=config.normalise,
            scale=config.scale,
        )
        logits = functional.linear(tokens, self._required(f"{name}.gate.weight"))
        weights, experts = route(logits, rule, self._tensors(f"{name}.gate.e_score_correction_bias"))
        total = self._mlp(f"{name}.shared_experts", tokens)
        for expert in torch.unique(experts).tolist():
            rows, ranks = (experts == expert).nonzero(as_tuple=True)
            output = self._mlp(f"{name}.experts.{expert}", tokens[rows])
            total = total.index_add(0, rows, output * weights[rows, ranks].unsqueeze(-1))
        return total.view_as(x)


def _heads(x: torch.Tensor, width: int) -> torch.Tensor:
    """(B, T, H * width) -> (B, T, H, width)."""
    return x.view(*x.shape[:-1], -1, width)


def _attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of (B, T, Hq, D) queries to (B, T, Hk, D) keys -> (B, T, Hq * Dv)."""
    queries, keys, values = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    attended = functional.scaled_dot_product_attention(
        queries, keys, values, is_causal=True, scale=scale, enable_gqa=True
    )
    return attended.transpose(1, 2).flatten(2)
