"""Configs of released models, and variants that must be refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.manifest import read_manifest
from engines.models.config import DecoderConfig, DeepseekConfig, ModelConfig, parse_config
from engines.protocol import EngineLoadError
from tests.unit.models.checkpoints import DEEPSEEK_V2, DEEPSEEK_V3, LLAMA, QWEN2, QWEN3, write_config

R1_DISTILL_QWEN_1_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
V2_LITE_ROPE = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}


def parse(folder: Path, config: dict[str, Any]) -> ModelConfig:
    return parse_config(read_manifest(write_config(folder, config), random_weights=True))


def test_r1_distill(tmp_path: Path) -> None:
    config = parse(tmp_path, R1_DISTILL_QWEN_1_5B)
    assert isinstance(config, DecoderConfig)
    assert (config.heads, config.kv_heads, config.head_dim) == (12, 2, 128)
    assert (config.qkv_bias, config.output_bias, config.qk_norm, config.tied_head) == (True, False, False, False)
    assert (config.rope.kind, config.rope.dim, config.rope.theta) == ("default", 128, 10000.0)


def test_old_and_new_spelling_of_rope_are_one(tmp_path: Path) -> None:
    old = {**DEEPSEEK_V2, "max_position_embeddings": 163840, "rope_theta": 20000.0, "rope_scaling": V2_LITE_ROPE}
    parameters = {**V2_LITE_ROPE, "rope_type": "yarn", "rope_theta": 20000.0}
    del parameters["type"]
    new = {**DEEPSEEK_V2, "max_position_embeddings": 163840, "rope_parameters": parameters}
    new.pop("rope_theta")
    first, second = parse(tmp_path, old), parse(tmp_path, new)
    assert first == second
    assert (first.rope.kind, first.rope.factor, first.rope.trained_positions) == ("yarn", 40.0, 4096)


def test_families_differ_in_values_only(tmp_path: Path) -> None:
    llama, qwen2, qwen3 = (parse(tmp_path, config) for config in (LLAMA, QWEN2, QWEN3))
    assert isinstance(llama, DecoderConfig)
    assert isinstance(qwen2, DecoderConfig)
    assert isinstance(qwen3, DecoderConfig)
    assert [config.qkv_bias for config in (llama, qwen2, qwen3)] == [False, True, False]
    assert [config.qk_norm for config in (llama, qwen2, qwen3)] == [False, False, True]
    assert [config.tied_head for config in (llama, qwen2, qwen3)] == [False, True, False]


def test_deepseek_v3(tmp_path: Path) -> None:
    config = parse(tmp_path, DEEPSEEK_V3)
    assert isinstance(config, DeepseekConfig)
    assert (config.moe.scoring, config.moe.correction_bias, config.moe.normalise) == ("sigmoid", True, True)
    assert (config.moe.groups, config.moe.top_groups, config.moe.scale) == (4, 2, 2.5)
    assert (config.moe.shared_intermediate, config.mtp_layers) == (32, 1)


def test_plain_top_k_is_not_limited_by_the_groups_in_the_file(tmp_path: Path) -> None:
    config = parse(tmp_path, {**DEEPSEEK_V2, "n_group": 1, "topk_group": 1})
    assert isinstance(config, DeepseekConfig)
    assert (config.moe.groups, config.moe.correction_bias) == (1, False)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads must be a divisor of the 4"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers must be a whole number"),
        (LLAMA, {"hidden_size": None}, "hidden_size must be"),
        (LLAMA, {"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
        (LLAMA, {"head_dim": 7}, "even width"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial rotation"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotation"),
        (LLAMA, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type must be one of"),
        (LLAMA, {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type must be one of"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "factor must be a number above 0"),
        (LLAMA, {"rope_scaling": {"rope_type": "divisors", "divisors": [1.0]}}, "divisors must be 4 numbers"),
        (LLAMA, {"rope_scaling": "fast"}, "rope_scaling must be an object"),
        (LLAMA, {"attention_bias": "yes"}, "attention_bias must be true or false"),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
            "contradict",
        ),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding-window"),
        (QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        (DEEPSEEK_V2, {"topk_method": "noaux_tc"}, "routing 'noaux_tc' with 'softmax'"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "routing 'noaux_tc' with 'softmax'"),
        (DEEPSEEK_V3, {"n_group": 3}, "disagree"),
        (DEEPSEEK_V3, {"n_group": 8, "topk_group": 8}, "two experts in each group"),
        (DEEPSEEK_V3, {"num_experts_per_tok": 5}, "disagree"),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq must be 1"),
        (DEEPSEEK_V3, {"first_k_dense_replace": -1}, "first_k_dense_replace must be a whole number"),
    ],
)
def test_refused(base: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match=message):
        parse(tmp_path, {**base, **change})


def test_a_window_that_no_layer_uses_is_no_window(tmp_path: Path) -> None:
    parse(tmp_path, {**QWEN2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2})
    parse(tmp_path, {**QWEN2, "use_sliding_window": False, "sliding_window": 8})
    parse(tmp_path, {**QWEN3, "layer_types": ["full_attention"] * 2})


ODD_VALUES: list[Any] = [None, True, 0, -1, 1.5, 1 << 40, 1 << 80, float("nan"), float("inf"), "", "x"]
ODD_VALUES += [[], [None], [1, "a"], {}, {"a": 1}]


@pytest.mark.parametrize("base", [R1_DISTILL_QWEN_1_5B, DEEPSEEK_V3], ids=["qwen2", "deepseek_v3"])
def test_an_odd_value_is_read_or_refused_and_nothing_else(base: dict[str, Any], tmp_path: Path) -> None:
    whole = {**base, "rope_scaling": V2_LITE_ROPE, "layer_types": None, "architectures": None, "n_group": 4}
    places = [(key,) for key in whole] + [("rope_scaling", key) for key in V2_LITE_ROPE]
    refusals = []
    for place in places:
        for value in ODD_VALUES:
            config = {**whole, "rope_scaling": dict(V2_LITE_ROPE)}
            target = config if len(place) == 1 else config["rope_scaling"]
            target[place[-1]] = value
            try:
                parse(tmp_path, config)
            except EngineLoadError as error:
                refusals.append((place, value, str(error)))
    assert len(refusals) > 100
    for place, value, message in refusals:
        assert any(word in message for word in (place[-1], "supported", "disagree")), (place, value)
