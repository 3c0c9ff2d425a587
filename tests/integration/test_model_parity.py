"""Every model family against ``transformers`` on small random models: the same weights must give the same logits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from engines.manifest import read_manifest
from engines.models.loader import Model, load_model
from engines.protocol import EngineSpec
from tests.paged_rows import PagedRows

transformers = pytest.importorskip("transformers", reason="transformers is the reference; install .[dev]")

VOCAB = 97
TOLERANCE = 1e-4
PROMPTS = (37, 18, 5)
"""Lengths: over several blocks, block borders inside, and shorter than a chunk."""
OUTPUT = 6

DENSE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
DEEPSEEK_YARN = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.9, "beta_fast": 32, "beta_slow": 1}
DEEPSEEK = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", DENSE),
    "llama-llama3-rope": ("Llama", {**DENSE, "rope_parameters": LLAMA3, "head_dim": 16}),
    "llama-linear-rope": ("Llama", {**DENSE, "rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    "llama-tied": ("Llama", {**DENSE, "tie_word_embeddings": True, "num_key_value_heads": 6}),
    "llama-biases": ("Llama", {**DENSE, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {**DENSE, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2-yarn": ("Qwen2", {**DENSE, "rope_parameters": YARN}),
    "qwen3": ("Qwen3", {**DENSE, "head_dim": 16}),
    "deepseek-v2-lite": ("DeepseekV2", {**DEEPSEEK, "topk_method": "greedy", "rope_parameters": DEEPSEEK_YARN}),
    "deepseek-v2-groups": (
        "DeepseekV2",
        {
            **DEEPSEEK,
            "q_lora_rank": 24,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 3.0,
        },
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            **DEEPSEEK,
            "q_lora_rank": 24,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "rope_parameters": DEEPSEEK_YARN,
            "num_nextn_predict_layers": 1,
        },
    ),
    "deepseek-v3-half-split-rope": (
        "DeepseekV3",
        {**DEEPSEEK, "n_group": 1, "topk_group": 1, "rope_interleave": False},
    ),
}


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    """The reference model and ours, loaded from the files that it saved."""
    family, values = CASES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**values)
    reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, tensor in reference.state_dict().items():
            # Untrained weights are too small to tell a wrong bias, norm or rotation from a right one.
            tensor.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    manifest = read_manifest(folder)
    model = load_model(manifest, EngineSpec(name="tiny"), torch.device("cpu"), torch.float32, lambda progress: None)
    return reference, model


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def sequences() -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(VOCAB) for _ in range(length + OUTPUT)] for length in PROMPTS]


def expected_logits(reference: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [reference(torch.tensor([tokens])).logits[0] for tokens in sequences()]


@pytest.mark.parametrize("chunk", [1, 5, 16, 64], ids=lambda chunk: f"chunk{chunk}")
def test_prompts_and_decode(pair: tuple[Any, Model], chunk: int) -> None:
    """All rows in each step: prompts in chunks of one size, then one token a step, over a shuffled paged cache."""
    reference, model = pair
    rows = PagedRows(model, rows=len(PROMPTS), longest=64)
    parts: list[list[torch.Tensor]] = [[] for _ in PROMPTS]
    tokens = sequences()
    while any(rows.lengths[row] < len(tokens[row]) for row in range(len(PROMPTS))):
        share = {}
        for row, length in enumerate(PROMPTS):
            start = rows.lengths[row]
            stop = min(start + chunk, length) if start < length else start + 1
            if start < len(tokens[row]):
                share[row] = tokens[row][start:stop]
        for row, logits in rows.step(share).items():
            parts[row].append(logits)
    for part, expected in zip(parts, expected_logits(reference), strict=True):
        assert torch.cat(part).sub(expected).abs().max() < TOLERANCE
