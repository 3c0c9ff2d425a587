"""Random-weight models small enough for a step of a millisecond, as the folders that the engine loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engines.generation.engine import GenerationEngine
from engines.protocol import EngineSpec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}


def model_folder(parent: Path, config: dict[str, Any]) -> Path:
    """A folder with this config and nothing else: its weights are random."""
    folder = parent / str(config["model_type"])
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tiny_spec(folder: Path, **fields: Any) -> EngineSpec:
    """Random weights on one CPU thread, unless ``fields`` say otherwise."""
    values: dict[str, Any] = {
        "name": "tiny",
        "source": str(folder),
        "random_weights": 1,
        "threads": 1,
        "max_batch": 8,
        "max_step_tokens": 64,
    }
    return EngineSpec(**values | fields)


def load_tiny(folder: Path, **fields: Any) -> GenerationEngine:
    return GenerationEngine.load(tiny_spec(folder, **fields), lambda progress: None)
