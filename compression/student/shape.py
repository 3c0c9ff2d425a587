"""The student's size, and its ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Shape:
    """DeepSeek-V2 without a query latent. All widths are multiples of 64, so that groups of 64 weights divide them."""

    vocab: int = 8192
    hidden: int = 256
    layers: int = 7
    """The first has a dense feed-forward."""
    dense_intermediate: int = 512
    heads: int = 4
    latent: int = 128
    """Width of the key-value latent."""
    nope: int = 32
    """Of a head: dimensions without position."""
    rope: int = 32
    value: int = 64
    experts: int = 16
    chosen: int = 2
    shared: int = 1
    intermediate: int = 128
    """Of one expert."""
    context: int = 1024

    @property
    def query(self) -> int:
        """Width of a query head."""
        return self.nope + self.rope


SMOKE = Shape(vocab=512, hidden=64, layers=3, dense_intermediate=128, latent=64, intermediate=64, context=512)
"""Small enough to be trained on one core in a minute: to try the chain, not to measure anything."""


def config_json(shape: Shape, end: int) -> dict[str, Any]:
    """As Hugging Face's ``deepseek_v2``; ``end`` is the id of the token that begins and ends texts."""
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "dtype": "float32",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.dense_intermediate,
        "moe_intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "q_lora_rank": None,
        "kv_lora_rank": shape.latent,
        "qk_nope_head_dim": shape.nope,
        "qk_rope_head_dim": shape.rope,
        "v_head_dim": shape.value,
        "n_routed_experts": shape.experts,
        "n_shared_experts": shape.shared,
        "num_experts_per_tok": shape.chosen,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "topk_method": "greedy",
        "n_group": None,
        "topk_group": None,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": EPS,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
    }
