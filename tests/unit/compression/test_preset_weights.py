"""The table of what presets' weights are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.preset_cards import BARS
from benchmarks.preset_weights import PAIRS, WEIGHT_ONLY, entry, pairs, table
from compression.recipe import load_recipe

BASE: dict[str, Any] = {"tokens": [10.0, 30.0], "base_loss": [30.0, 90.0], "divergence": [1.0, 3.0]}


def test_pairs_are_of_the_same_windows_and_their_files(tmp_path: Path) -> None:
    one, other = PAIRS[0]
    found = {one: {**BASE, "loss": [30.5, 91.5]}, other: {**BASE, "loss": [31.0, 93.0]}}
    for name, size in ((one, 90), (other, 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(size))
    both = pairs(found, tmp_path)
    assert both[f"{one} / {other}"]["perplexity"]["value"] == pytest.approx(0.95123, abs=1e-5)
    assert both[f"{one} / {other}"]["bytes"] == 0.9
    presets = {name: entry(sums, tmp_path / name) for name, sums in found.items()}
    assert presets[other]["met"] is (presets[other]["ratio"]["value"] <= (BARS[other] or 0))
    lines = table(presets, both)
    assert len(lines) == 2 + 2 + 1
    assert "1.0513" in lines[2]
    assert pairs({one: found[one]}, tmp_path) == {}


def test_these_presets_leave_inputs_as_they_are() -> None:
    for name in WEIGHT_ONLY:
        assert all(rule.activations == "float" for rule in load_recipe(name).layers)
