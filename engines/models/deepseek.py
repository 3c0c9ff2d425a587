"""DeepSeek-V2 and V3: multi-head latent attention (MLA) over a compressed cache."""

from __future__ import annotations

import torch

from engines.kernels import (
    Fusion,
    LatentQueries,
    RmsNorm,
    Stream,
    dense,
    last_latent_attention,
    latent_attention,
    pack_latent_up,
)
from engines.models.batch import Batch, KvLayout, LastTokens, LayerCache
from engines.models.config import DeepseekConfig
from engines.models.experts import Experts
from engines.models.layers import Linear, ModelBuilder
from engines.models.model import Layer
from engines.models.rope import softmax_gain

LATENT_EPS = 1e-6
"""Of the norms on latents; the checkpoints' own code fixes it, whatever ``rms_norm_eps`` says."""


class LatentAttention:
    """MLA. With a query latent, both latents are one layer of x; else queries and latents are, where one device has
    all heads."""

    def __init__(self, config: DeepseekConfig, builder: ModelBuilder, name: str, cos_sin: torch.Tensor) -> None:
        heads = builder.share(config.heads, "attention heads")
        self.head_width, self.latent_width = config.nope_dim + config.rope.dim, config.kv_lora_rank + config.rope.dim
        self.query_width, self.query_rank = heads * self.head_width, config.q_lora_rank or 0
        self._take_inputs(config, builder, name)
        gain = builder.tensor(f"{name}.kv_a_layernorm.weight", (config.kv_lora_rank,))
        up_width = config.heads * (config.nope_dim + config.value_dim)
        # Attention absorbs this one into queries and values, so it is applied as a plain tensor in any format.
        up = dense(builder.matrix(f"{name}.kv_b_proj", up_width, config.kv_lora_rank, "out"), gain.dtype)
        self.shape = LatentQueries(
            up=pack_latent_up(up, heads, config.nope_dim),
            latent_gain=gain,
            latent_eps=LATENT_EPS,
            cos_sin=cos_sin,
            interleaved=config.rope_interleaved,
            scale=self.head_width**-0.5 * softmax_gain(config.rope),
        )
        self.output: Linear = builder.linear(
            {f"{name}.o_proj": config.hidden}, config.heads * config.value_dim, "in", config.attention_bias
        )

    def _take_inputs(self, config: DeepseekConfig, builder: ModelBuilder, name: str) -> None:
        query_width = config.heads * self.head_width
        latents = {f"{name}.kv_a_proj_with_mqa": self.latent_width}
        self.query: Linear | None = None
        if self.query_rank:
            latents = {f"{name}.q_a_proj": self.query_rank, **latents}
            self.query_norm = builder.norm(f"{name}.q_a_layernorm.weight", self.query_rank, LATENT_EPS)
            self.query = builder.linear({f"{name}.q_b_proj": query_width}, self.query_rank, "out")
        elif builder.source.world > 1 or config.attention_bias:
            self.query = builder.linear({f"{name}.q_proj": query_width}, config.hidden, "out")
        else:
            latents = {f"{name}.q_proj": query_width, **latents}
        self.inputs: Linear = builder.linear(latents, config.hidden, "none", config.attention_bias)

    def __call__(
        self,
        stream: Stream,
        norm: RmsNorm,
        batch: Batch,
        cache: LayerCache,
        next_norm: RmsNorm | None = None,
        last: LastTokens | None = None,
    ) -> Stream:
        inputs = self.inputs(stream, Fusion(norm=norm))
        latents = inputs[:, inputs.shape[1] - self.latent_width :]
        if self.query is None:
            queries = inputs[:, : self.query_width]
        elif self.query_rank:
            queries = self.query(inputs[:, : self.query_rank], Fusion(norm=self.query_norm))
        else:
            queries = self.query(stream, Fusion(norm=norm))
        if last is None:
            attended = latent_attention(queries, latents, self.shape, cache, batch)
        else:
            stream = Stream(stream.hidden.index_select(0, last.tokens))
            attended = last_latent_attention(queries, latents, self.shape, cache, batch, last.tokens, last.batch)
        return self.output.add_to(stream, attended, next_norm)


def build_layers(
    config: DeepseekConfig, builder: ModelBuilder, cos_sin: torch.Tensor, uniform_routing: bool
) -> tuple[Layer, ...]:
    """``cos_sin`` is the rope table, (positions, rope_dim) float32. ``uniform_routing`` draws experts at random."""
    return tuple(build_layer(config, builder, cos_sin, index, uniform_routing) for index in range(config.layers))


def build_layer(
    config: DeepseekConfig, builder: ModelBuilder, cos_sin: torch.Tensor, index: int, uniform_routing: bool = False
) -> Layer:
    """One of them alone."""
    name = f"model.layers.{index}"
    dense = index < config.moe.dense_layers
    return Layer(
        builder.norm(f"{name}.input_layernorm.weight", config.hidden, config.eps),
        LatentAttention(config, builder, f"{name}.self_attn", cos_sin),
        builder.norm(f"{name}.post_attention_layernorm.weight", config.hidden, config.eps),
        builder.mlp(f"{name}.mlp", config.hidden, config.intermediate)
        if dense
        else Experts(config.moe, config.hidden, builder, f"{name}.mlp", index if uniform_routing else None),
    )


def kv_layout(config: DeepseekConfig) -> KvLayout:
    """Every rank holds the whole latent."""
    return KvLayout(config.layers, ((config.kv_lora_rank + config.rope.dim,),), latent_rank=config.kv_lora_rank)
