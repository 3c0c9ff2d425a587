"""Small checkpoints of each family, written as Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engines.manifest import Manifest, read_manifest
from engines.models.config import parse_config
from engines.models.loader import Model, build_model, load_model
from engines.models.weights import Placement, RandomSource
from engines.protocol import EngineSpec
from engines.quant.base import Split

CPU = torch.device("cpu")
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "float32",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
QWEN3 = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
DEEPSEEK_V2: dict[str, Any] = {
    **LLAMA,
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "topk_method": "greedy",
    "scoring_func": "softmax",
}
DEEPSEEK_V3: dict[str, Any] = {
    **DEEPSEEK_V2,
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "q_lora_rank": 24,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}
FAMILIES = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
}


class RecordingSource(RandomSource):
    """Random weights that can be written down."""

    def __init__(self) -> None:
        super().__init__(Placement(device=CPU, dtype=torch.float32), seed=3)
        self.tensors: dict[str, torch.Tensor] = {}
        self.splits: dict[str, Split] = {}

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        split: Split,
        dtype: torch.dtype | None = None,
        invented: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tensor = super().take(name, shape, split, dtype, invented)
        if len(shape) == 1 and tensor.is_floating_point():
            tensor += torch.randn(shape, generator=torch.Generator().manual_seed(len(self.tensors))) * 0.3
        self.tensors[name] = tensor.clone()
        self.splits[name] = split
        return tensor


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def record(folder: Path, config: dict[str, Any]) -> RecordingSource:
    """All tensors that a checkpoint of this config has; writes ``config.json``."""
    manifest = read_manifest(write_config(folder, config), random_weights=True)
    source = RecordingSource()
    build_model(parse_config(manifest), source, positions=1)
    return source


def write_checkpoint(folder: Path, config: dict[str, Any], shards: int = 1) -> dict[str, torch.Tensor]:
    """Write a folder that loads, and return its tensors."""
    tensors = record(folder, config).tensors
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        part = {name: tensors[name] for name in names[shard::shards]}
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def load(manifest: Manifest, *, rank: int = 0, world: int = 1, **spec: Any) -> Model:
    return load_model(
        manifest, EngineSpec(name="tiny", **spec), CPU, torch.float32, lambda progress: None, rank=rank, world=world
    )
