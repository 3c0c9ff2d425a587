"""The dense decoder family: Llama, Qwen2 and Qwen3 are values of ``DecoderConfig``."""

from __future__ import annotations

import torch

from engines import kernels
from engines.models.batch import Batch, KvLayout, LayerCache
from engines.models.config import DecoderConfig
from engines.models.layers import Linear, ModelBuilder
from engines.models.model import Layer


class GroupedQueryAttention:
    """Attention in which groups of query heads share a key/value head."""

    def __init__(self, config: DecoderConfig, builder: ModelBuilder, name: str, cos_sin: torch.Tensor) -> None:
        width = config.head_dim
        kv_width = config.kv_heads * width
        self.heads = builder.share(config.heads, "attention heads")
        self.kv_heads = builder.share(config.kv_heads, "key/value heads")
        self.head_dim = width
        self.eps = config.eps
        self.scale = width**-0.5
        self.cos_sin = cos_sin
        parts = {f"{name}.q_proj": config.heads * width, f"{name}.k_proj": kv_width, f"{name}.v_proj": kv_width}
        self.qkv: Linear = builder.linear(parts, config.hidden, "out", config.qkv_bias)
        self.output: Linear = builder.linear(
            {f"{name}.o_proj": config.hidden}, config.heads * width, "in", config.output_bias
        )
        self.query_norm: torch.Tensor | None = None
        self.key_norm: torch.Tensor | None = None
        if config.qk_norm:
            self.query_norm = builder.tensor(f"{name}.q_norm.weight", (width,))
            self.key_norm = builder.tensor(f"{name}.k_norm.weight", (width,))

    def __call__(self, x: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
        heads, kv_heads = self.heads, self.kv_heads
        qkv = self.qkv(x).view(-1, heads + 2 * kv_heads, self.head_dim)
        queries, keys, values = qkv.split_with_sizes((heads, kv_heads, kv_heads), dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            queries = kernels.rms_norm(queries, self.query_norm, self.eps)
            keys = kernels.rms_norm(keys, self.key_norm, self.eps)
        kernels.rope_write_kv(
            queries,
            keys,
            values,
            batch.positions,
            self.cos_sin,
            interleaved=False,
            cache=cache,
            cache_slots=batch.cache_slots,
        )
        attended = kernels.paged_attention(queries, cache, batch, self.scale)
        return self.output(attended.view(-1, heads * self.head_dim))


def build_layers(config: DecoderConfig, builder: ModelBuilder, cos_sin: torch.Tensor) -> tuple[Layer, ...]:
    """``cos_sin`` is the rope table, (positions, head_dim) float32."""
    layers = []
    for index in range(config.layers):
        name = f"model.layers.{index}"
        layers.append(
            Layer(
                builder.tensor(f"{name}.input_layernorm.weight", (config.hidden,)),
                GroupedQueryAttention(config, builder, f"{name}.self_attn", cos_sin),
                builder.tensor(f"{name}.post_attention_layernorm.weight", (config.hidden,)),
                builder.mlp(f"{name}.mlp", config.hidden, config.intermediate, config.mlp_bias),
            )
        )
    return tuple(layers)


def kv_layout(config: DecoderConfig, builder: ModelBuilder) -> KvLayout:
    """Of this rank's key/value heads."""
    shape = (builder.share(config.kv_heads, "key/value heads"), config.head_dim)
    return KvLayout(config.layers, (shape, shape))
