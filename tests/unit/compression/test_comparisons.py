"""The benchmarks that compare presets with their bars and with another library."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from benchmarks.compression_peer import Settings, our_recipe, ratio_to_base, ratio_to_peer, write_dequantized
from benchmarks.preset_cards import BARS, arithmetic, table
from compression.base_model import BaseModel
from compression.compress import Job, compress
from compression.plan import linear_layers
from compression.recipe import load_recipe, parse_recipe, preset_names
from engines.manifest import read_manifest
from tests.unit.compression.jobs import difference
from tests.unit.models.checkpoints import CPU


def compressed(base: Path, preset: str) -> Path:
    out = base.with_name(preset)
    compress(Job(base, "base", load_recipe(preset), out), lambda step: None, lambda: 0.0)
    return out


def test_the_other_library_gets_what_the_quantized_weights_mean(base: Path) -> None:
    out = compressed(base, "int8")
    write_dequantized(out, base.with_name("plain"))
    config = json.loads((base.with_name("plain") / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    plain, quantized = (BaseModel(read_manifest(folder), CPU) for folder in (base.with_name("plain"), out))
    for layer in [*linear_layers(plain.config), *plain.outer_layers()]:
        assert torch.equal(plain.linear(layer), quantized.linear(layer))
    assert difference(base.with_name("plain"), base) < 0.02


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_both_sides_round_to_the_same_grid(method: str, tmp_path: Path) -> None:
    settings = Settings(tmp_path, tmp_path, 64, windows=8, tokens=128, text_windows=2, threads=1)
    recipe = parse_recipe(our_recipe(method, settings), "ours")
    assert (recipe.layers[0].bits, recipe.layers[0].group_size, recipe.layers[0].symmetric) == (4, 64, False)
    assert recipe.calibration is not None
    assert (recipe.calibration.windows, recipe.calibration.tokens) == (8, 128)
    assert (recipe.scaling is not None) == (method == "awq")


def test_ratios_are_of_perplexities_over_the_same_tokens() -> None:
    ours: dict[str, Any] = {"tokens": [10.0, 30.0], "loss": [31.0, 93.0], "base_loss": [30.0, 90.0]}
    peer: dict[str, Any] = {**ours, "loss": [30.5, 91.5]}
    assert ratio_to_base(ours).value == pytest.approx(math.exp(0.1))
    assert ratio_to_peer(ours, peer).value == pytest.approx(math.exp(0.05))


def test_every_preset_without_experts_has_a_row() -> None:
    assert set(BARS) == set(preset_names()) - {"deepseek-mixed", "moe-hot-cold"}


@pytest.mark.parametrize("preset", ["int8", "fp8", "fp8-block"])
def test_sizes_are_what_the_recipe_says(base: Path, preset: str) -> None:
    with safe_open(compressed(base, preset) / "model.safetensors", framework="pt") as file:
        size = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118  (no dict)
    assert size == pytest.approx(arithmetic(preset, str(base)), rel=0.02)


def test_a_missed_bar_is_said() -> None:
    one = {"bytes": 1, "to_arithmetic": 1.0, "divergence": {"value": 0.1}}
    rows: dict[str, dict[str, Any]] = {
        name: {**one, "ratio": dict.fromkeys(("value", "low", "high"), ratio), "bar": bar, "met": ratio <= bar}
        for name, ratio, bar in (("int4-g64", 1.13, 1.12), ("int8", 1.004, 1.005))
    }
    int8, int4 = table(rows)[2:]
    assert "missed" not in int8
    assert "1.12 (missed by 0.010)" in int4
