from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compression.errors import CompressionError
from compression.plan import LinearLayer, linear_layers, make_plan
from compression.recipe import load_recipe, parse_recipe, preset_names
from engines.manifest import read_manifest
from engines.models.config import parse_config
from tests.unit.compression.recipes import recipe
from tests.unit.models.checkpoints import DEEPSEEK_V2, DEEPSEEK_V3, LLAMA, write_config

LAYERS = [
    LinearLayer("model.layers.0.self_attn.q_proj", 64, 64),
    LinearLayer("model.layers.0.mlp.up_proj", 96, 64),
    LinearLayer("model.layers.0.mlp.down_proj", 64, 96),
]
OUTER = [LinearLayer("model.embed_tokens", 100, 64)]


def test_every_preset_is_a_recipe() -> None:
    wanted = {"int8-dynamic", "w8a8", "int4-g128", "int4-g64", "deepseek-mixed", "moe-hot-cold", "kmeans-4bit"}
    assert wanted | {"fp8", "fp8-block", "int4-g64-tuned"} <= set(preset_names())
    for name in preset_names():
        assert load_recipe(name).description


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: []", "length >= 1"),
        ("layers: [{match: ['*'], bits: 9}]", "<= 8"),
        ("layers: [{match: ['*'], bit: 4}]", "unknown field `bit`"),
        ("layers: [{match: ['re:('], bits: 4}]", "no regular expression"),
        ("layers: [{match: ['*'], bits: 4, activations: int8}]", "int8 activations go with 8-bit integers"),
        ("layers: [{match: ['*'], kind: float8, group_size: 64}]", "float8 has no groups"),
        ("layers: [{match: ['*'], method: kmeans}]", "codebook and method kmeans"),
        ("layers: [{match: ['*'], static_input: true}]", "static_input needs"),
        ("layers: [{match: ['*']}]\ncompensation: {method: scales, step: 4}", "unknown field `step`"),
        ("layers: [{match: ['*']}]\ncompensation: {method: magic}", "Invalid enum value 'magic'"),
        ("layers: [{match: ['*']}]\ncalibration: {source: web}", "Invalid enum value 'web'"),
        ("- a list", "a mapping"),
        ("{", "not YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_with_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        parse_recipe(text, "wrong.yaml")


def test_an_unknown_recipe_names_the_presets(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="int4-g64"):
        load_recipe(str(tmp_path / "int5"))


def test_the_first_rule_that_matches_counts() -> None:
    rules = recipe({"match": ["*.down_proj"], "kind": "none"}, {"match": ["re:.*mlp.*"], "bits": 4})
    plan = make_plan(rules, LAYERS, OUTER, torch.bfloat16)
    assert list(plan.layers) == ["model.layers.0.mlp.up_proj"]
    assert plan.layers["model.layers.0.mlp.up_proj"].scheme.bits == 4


def test_the_embedding_is_matched_by_its_name_alone() -> None:
    assert "model.embed_tokens" not in make_plan(recipe({}), LAYERS, OUTER, torch.bfloat16).layers
    named = make_plan(recipe({"match": ["*", "model.embed_tokens"]}), LAYERS, OUTER, torch.bfloat16)
    assert "model.embed_tokens" in named.layers


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(CompressionError, match=r"'\*.experts.\*' matches no layer"):
        make_plan(recipe({"match": ["*.experts.*"]}), LAYERS, OUTER, torch.bfloat16)


@pytest.mark.parametrize(
    ("wanted", "width", "fitting"), [(128, 576, 64), (128, 10944, 64), (64, 96, 32), (32, 36, None)]
)
def test_a_group_size_that_does_not_divide_falls_back_and_says_so(wanted: int, width: int, fitting: int | None) -> None:
    layers = [LinearLayer("model.layers.0.mlp.up_proj", 8, 256), LinearLayer("model.layers.0.mlp.down_proj", 8, width)]
    plan = make_plan(recipe({"bits": 4, "group_size": wanted}), layers, [], torch.bfloat16)
    found = plan.layers.get("model.layers.0.mlp.down_proj")
    assert (found.scheme.group_size if found else None) == fitting
    assert len(plan.notes) == 1
    assert str(width) in plan.notes[0]


@pytest.mark.parametrize(
    ("config", "count"), [(LLAMA, 14), (DEEPSEEK_V2, 4 + 3 + 4 + 27), (DEEPSEEK_V3, 5 + 3 + 5 + 27)]
)
def test_linear_layers_are_those_of_the_engine(tmp_path: Path, config: dict[str, Any], count: int) -> None:
    manifest = read_manifest(write_config(tmp_path / "model", config), random_weights=True)
    layers = linear_layers(parse_config(manifest))
    assert len({layer.name for layer in layers}) == len(layers) == count
