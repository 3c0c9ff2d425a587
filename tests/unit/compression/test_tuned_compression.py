"""Scales, roundings and biases that are tuned after quantization, layer by layer or by the whole model's answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compression.errors import CompressionError
from compression.progress import Progress
from tests.unit.compression.jobs import DISTILLATION, compensated, difference, distilled, job, run
from tests.unit.compression.recipes import recipe

SCALES = {"method": "scales", "steps": 40}
ROUNDING = {"method": "rounding", "steps": 40, "bias": "existing"}


@pytest.mark.parametrize("compensation", [SCALES, ROUNDING, {**SCALES, "bias": "new"}], ids=str)
def test_compensation_brings_the_logits_nearer(base: Path, text: Path, compensation: dict[str, Any]) -> None:
    rule = {"bits": 3, "group_size": 16, "symmetric": False, "method": "gptq"}
    run(job(base, recipe(rule, calibration={"windows": 8, "tokens": 32}), text, "plain"))
    steps: list[Progress] = []
    notes = run(job(base, compensated(compensation), text), steps)
    assert difference(base.parent / "out", base) < difference(base.parent / "plain", base)
    errors = [note for note in notes if "relative error of its output" in note]
    assert len(errors) == 2
    assert errors[0].startswith("layer 0: ")
    assert ("with its bias" in errors[0]) == (compensation.get("bias") == "new")
    assert [step.done for step in steps if step.what.startswith("layer ")][-1] == pytest.approx(2 / 3 * steps[-1].total)
    config = json.loads((base.parent / "out" / "config.json").read_text())
    assert config.get("mlp_bias", False) == (compensation.get("bias") == "new")


def test_experts_are_compensated_too(experts: Path, text: Path) -> None:
    notes = run(job(experts, compensated(ROUNDING), text))
    assert any("layer 1: relative error" in note for note in notes)
    assert difference(experts.parent / "out", experts) < 0.5


@pytest.mark.parametrize("model", ["base", "experts"])
def test_distillation_brings_the_logits_nearer(
    model: str, request: pytest.FixtureRequest, base: Path, text: Path
) -> None:
    request.getfixturevalue(model)
    rule = {"bits": 3, "group_size": 16, "symmetric": False, "method": "gptq"}
    run(job(base, recipe(rule, calibration={"windows": 9, "tokens": 32}), text, "plain"))
    steps: list[Progress] = []
    notes = run(job(base, distilled(DISTILLATION), text), steps)
    assert notes[-1].startswith("distillation: divergence ")
    assert "dropped" not in notes[-1]
    assert difference(base.parent / "out", base) < difference(base.parent / "plain", base)
    assert steps[-1].what == "distillation"
    assert steps[-1].done == pytest.approx(steps[-1].total, rel=0.4)


def test_distillation_that_wins_nothing_leaves_the_weights(base: Path, text: Path) -> None:
    notes = run(job(base, distilled({**DISTILLATION, "learning_rate": 1.0}), text))
    assert notes[-1].endswith("won nothing and was dropped")
    rule = {"bits": 3, "group_size": 16, "symmetric": False, "method": "gptq"}
    run(job(base, recipe(rule, calibration={"windows": 9, "tokens": 32}), text, "plain"))
    one, two = (base.parent / name / "model.safetensors" for name in ("out", "plain"))
    assert one.read_bytes() == two.read_bytes()


def test_new_biases_are_for_configs_that_can_say_so(experts: Path, text: Path) -> None:
    with pytest.raises(CompressionError, match=r"bias: new is for Llama's architecture alone.*deepseek_v2"):
        run(job(experts, compensated({**SCALES, "bias": "new"}), text))
