"""The shapes of published models, and one so small that a test can run it. Random weights fill them.

Random weights compute exactly as many operations as real ones, so speed needs no download.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
CONFIGS: dict[str, dict[str, Any]] = {
    "r1-1.5b": QWEN2
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rope_theta": 10000,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151646,
        "eos_token_id": 151643,
    },
    "r1-7b": QWEN2
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_theta": 10000,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151646,
        "eos_token_id": 151643,
    },
    "v2-lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "vocab_size": 102400,
        "rope_theta": 10000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 100000,
        "eos_token_id": 100001,
    },
    "smollm2-135m": LLAMA
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rope_theta": 100000,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "tiny": LLAMA
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "rope_theta": 10000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


EIGHT_BITS = {"num_bits": 8, "symmetric": True, "dynamic": False, "strategy": "channel"}
EACH_TOKEN = {"num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token"}
QUANTIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": (
        "pack-quantized",
        {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}},
    ),
    "int8": (
        "int-quantized",
        {"weights": EIGHT_BITS | {"type": "int"}, "input_activations": EACH_TOKEN | {"type": "int"}},
    ),
    "fp8": (
        "float-quantized",
        {"weights": EIGHT_BITS | {"type": "float"}, "input_activations": EACH_TOKEN | {"type": "float"}},
    ),
}
"""Formats of random quantized weights, as compressed-tensors says them: 4 bits in groups of 128; 8 bits, integer or
float, one scale a line, with inputs rounded to 8 bits token by token. All keep the head in 16 bits."""

MODEL_LEN = 4096
"""Longest sequence, in tokens, that the benchmarks ask the engine for."""


def config_folder(parent: Path, model: str, weights: str = "") -> Path:
    """A folder under ``parent`` with nothing but the model's ``config.json``; ``weights``: one of ``QUANTIZED``."""
    folder = parent / model
    folder.mkdir()
    quantized = {"quantization_config": quantization_config(weights)} if weights in QUANTIZED else {}
    (folder / "config.json").write_text(json.dumps(CONFIGS[model] | quantized))
    return folder


def quantization_config(weights: str) -> dict[str, Any]:
    """What the config of such a model says; ``weights``: one of ``QUANTIZED``."""
    layout, scheme = QUANTIZED[weights]
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **scheme}},
        "ignore": ["lm_head"],
    }
