"""The dense decoder family: Llama, Qwen2 and Qwen3 are values of ``DecoderConfig``."""

from __future__ import annotations

import torch

from engines.kernels import (
    Fusion,
    GroupedQueries,
    RmsNorm,
    Stream,
    grouped_query_attention,
    last_query_attention,
)
from engines.models.batch import Batch, KvLayout, LastTokens, LayerCache
from engines.models.config import DecoderConfig
from engines.models.layers import Linear, ModelBuilder
from engines.models.model import Layer


class GroupedQueryAttention:
    """Attention in which groups of query heads share a key/value head."""

    def __init__(self, config: DecoderConfig, builder: ModelBuilder, name: str, cos_sin: torch.Tensor) -> None:
        width = config.head_dim
        kv_width = config.kv_heads * width
        self.shape = GroupedQueries(
            heads=builder.share(config.heads, "attention heads"),
            kv_heads=builder.share(config.kv_heads, "key/value heads"),
            head_dim=width,
            scale=width**-0.5,
            cos_sin=cos_sin,
            query_norm=builder.norm(f"{name}.q_norm.weight", width, config.eps) if config.qk_norm else None,
            key_norm=builder.norm(f"{name}.k_norm.weight", width, config.eps) if config.qk_norm else None,
        )
        parts = {f"{name}.q_proj": config.heads * width, f"{name}.k_proj": kv_width, f"{name}.v_proj": kv_width}
        self.qkv: Linear = builder.linear(parts, config.hidden, "out", config.qkv_bias)
        self.output: Linear = builder.linear(
            {f"{name}.o_proj": config.hidden}, config.heads * width, "in", config.output_bias
        )

    def __call__(
        self,
        stream: Stream,
        norm: RmsNorm,
        batch: Batch,
        cache: LayerCache,
        next_norm: RmsNorm | None = None,
        last: LastTokens | None = None,
    ) -> Stream:
        qkv = self.qkv(stream, Fusion(norm=norm))
        if last is None:
            attended = grouped_query_attention(qkv, self.shape, cache, batch)
        else:
            stream = Stream(stream.hidden.index_select(0, last.tokens))
            attended = last_query_attention(qkv, self.shape, cache, batch, last.tokens, last.batch)
        return self.output.add_to(stream, attended, next_norm)


def build_layers(config: DecoderConfig, builder: ModelBuilder, cos_sin: torch.Tensor) -> tuple[Layer, ...]:
    """``cos_sin`` is the rope table, (positions, head_dim) float32."""
    return tuple(build_layer(config, builder, cos_sin, index) for index in range(config.layers))


def build_layer(config: DecoderConfig, builder: ModelBuilder, cos_sin: torch.Tensor, index: int) -> Layer:
    """One of them alone."""
    name = f"model.layers.{index}"
    return Layer(
        builder.norm(f"{name}.input_layernorm.weight", config.hidden, config.eps),
        GroupedQueryAttention(config, builder, f"{name}.self_attn", cos_sin),
        builder.norm(f"{name}.post_attention_layernorm.weight", config.hidden, config.eps),
        builder.mlp(f"{name}.mlp", config.hidden, config.intermediate, config.mlp_bias),
    )


def kv_layout(config: DecoderConfig, builder: ModelBuilder) -> KvLayout:
    """Of this rank's key/value heads."""
    shape = (builder.share(config.kv_heads, "key/value heads"), config.head_dim)
    return KvLayout(config.layers, (shape, shape))
