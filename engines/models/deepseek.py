"""DeepSeek-V2 and V3: multi-head latent attention (MLA) over a compressed cache."""

from __future__ import annotations

import torch

from engines import kernels
from engines.kernels import Fusion, RmsNorm
from engines.models.batch import Batch, KvLayout, LayerCache
from engines.models.config import DeepseekConfig
from engines.models.experts import Experts
from engines.models.layers import HeadwiseLinear, Linear, ModelBuilder
from engines.models.model import Layer
from engines.models.rope import softmax_gain

LATENT_EPS = 1e-6
"""Of the norms on latents; the checkpoints' own code fixes it, whatever ``rms_norm_eps`` says."""


class LatentAttention:
    """MLA in the absorbed form, for prefill too: queries go into the latent space, where the cache already is.

    For a long prompt that costs 3 to 4 times the multiplications of expanding keys and values, but it reads the
    compressed cache only, and one form gives a token the same result wherever a prompt is cut into chunks.
    """

    def __init__(self, config: DeepseekConfig, builder: ModelBuilder, name: str, cos_sin: torch.Tensor) -> None:
        self.heads = builder.share(config.heads, "attention heads")
        self.nope, self.rank, self.rope = config.nope_dim, config.kv_lora_rank, config.rope.dim
        self.value = config.value_dim
        self.interleaved = config.rope_interleaved
        self.scale = (self.nope + self.rope) ** -0.5 * softmax_gain(config.rope)
        self.cos_sin = cos_sin
        self._take_queries(config, builder, name)
        self.latent_norm = builder.tensor(f"{name}.kv_a_layernorm.weight", (self.rank,))
        up_shape = (config.heads * (self.nope + self.value), self.rank)
        up = builder.tensor(f"{name}.kv_b_proj.weight", up_shape, "out")
        up_keys, up_values = up.view(self.heads, -1, self.rank).split_with_sizes((self.nope, self.value), dim=1)
        self.absorb_key = HeadwiseLinear(up_keys.transpose(1, 2))
        self.absorb_value = HeadwiseLinear(up_values)
        self.output: Linear = builder.linear(
            {f"{name}.o_proj": config.hidden}, config.heads * self.value, "in", config.attention_bias
        )

    def _take_queries(self, config: DeepseekConfig, builder: ModelBuilder, name: str) -> None:
        """With a query latent, both latents are one layer of x; else queries come from x directly."""
        query_width = config.heads * (self.nope + self.rope)
        latents = {f"{name}.kv_a_proj_with_mqa": self.rank + self.rope}
        self.query_rank = config.q_lora_rank or 0
        if self.query_rank:
            latents = {f"{name}.q_a_proj": self.query_rank, **latents}
            self.query_norm = builder.tensor(f"{name}.q_a_layernorm.weight", (self.query_rank,))
            self.query: Linear = builder.linear({f"{name}.q_b_proj": query_width}, self.query_rank, "out")
        else:
            self.query = builder.linear({f"{name}.q_proj": query_width}, config.hidden, "out")
        self.latents: Linear = builder.linear(latents, config.hidden, "none", config.attention_bias)

    def __call__(self, hidden: torch.Tensor, norm: RmsNorm, batch: Batch, cache: LayerCache) -> torch.Tensor:
        x = norm(hidden)
        tokens, rank = x.shape[0], self.rank
        latents = self.latents(x)
        latent = latents[:, self.query_rank :]
        if self.query_rank:
            x = kernels.rms_norm(latents[:, : self.query_rank], self.query_norm, LATENT_EPS)
        queries = self.query(x).view(tokens, self.heads, self.nope + self.rope)
        latent[:, :rank] = kernels.rms_norm(latent[:, :rank], self.latent_norm, LATENT_EPS)
        absorbed = x.new_empty(tokens, self.heads, rank + self.rope)
        self.absorb_key(queries[..., : self.nope], absorbed[..., :rank])
        absorbed[..., rank:] = queries[..., self.nope :]
        kernels.rope_(
            absorbed[..., rank:], latent[:, rank:].unsqueeze(1), batch.positions, self.cos_sin, self.interleaved
        )
        kernels.write_latent(latent, cache, batch.cache_slots)
        attended = kernels.mla_attention(absorbed, cache, batch, self.scale, rank)
        values = x.new_empty(tokens, self.heads, self.value)
        self.absorb_value(attended, values)
        return self.output(values.view(tokens, self.heads * self.value), Fusion(residual=hidden))


def build_layers(config: DeepseekConfig, builder: ModelBuilder, cos_sin: torch.Tensor) -> tuple[Layer, ...]:
    """``cos_sin`` is the rope table, (positions, rope_dim) float32."""
    layers = []
    for index in range(config.layers):
        name = f"model.layers.{index}"
        dense = index < config.moe.dense_layers
        layers.append(
            Layer(
                builder.norm(f"{name}.input_layernorm.weight", config.hidden, config.eps),
                LatentAttention(config, builder, f"{name}.self_attn", cos_sin),
                builder.norm(f"{name}.post_attention_layernorm.weight", config.hidden, config.eps),
                builder.mlp(f"{name}.mlp", config.hidden, config.intermediate)
                if dense
                else Experts(config.moe, config.hidden, builder, f"{name}.mlp"),
            )
        )
    return tuple(layers)


def kv_layout(config: DeepseekConfig) -> KvLayout:
    """Every rank holds the whole latent."""
    return KvLayout(config.layers, ((config.kv_lora_rank + config.rope.dim,),))
