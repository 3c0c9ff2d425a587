"""A run that was killed is begun again by the same command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compression import compress as module
from compression.compress import compress
from compression.errors import CompressionError
from compression.export import save_tensors
from compression.progress import Progress
from compression.recipe import Recipe
from tests.unit.compression.jobs import DISTILLATION, GPTQ, INT8, Killed, compensated, distilled, job, run, ticks
from tests.unit.compression.recipes import recipe


@pytest.mark.parametrize("wanted", [INT8, GPTQ, compensated({"method": "rounding", "steps": 5})])
def test_a_run_that_was_killed_goes_on_where_it_was(
    base: Path, text: Path, wanted: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(job(base, wanted, text, "whole"))
    quantized: list[int] = []

    def save_and_count(path: Path, tensors: dict[str, torch.Tensor], notes: list[str]) -> None:
        quantized.append(1)
        save_tensors(path, tensors, notes)

    def save_and_die(path: Path, tensors: dict[str, torch.Tensor], notes: list[str]) -> None:
        save_and_count(path, tensors, notes)
        if path.name == "layer-00000.safetensors":
            raise Killed

    monkeypatch.setattr(module, "save_tensors", save_and_die)
    with pytest.raises(Killed):
        run(job(base, wanted, text))
    before = len(quantized)
    monkeypatch.setattr(module, "save_tensors", save_and_count)
    other = recipe({"bits": 4, "group_size": 32})
    with pytest.raises(CompressionError, match="unfinished run"):
        run(job(base, other, text))
    run(job(base, wanted, text))
    assert len(quantized) - before == 1
    one, two = (base.parent / name / "model.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == two.read_bytes()


def test_a_distillation_that_was_killed_goes_on_where_it_was(base: Path, text: Path) -> None:
    wanted = distilled(DISTILLATION)
    run(job(base, wanted, text, "whole"))
    seen: list[Progress] = []

    def die(step: Progress) -> None:
        seen.append(step)
        if sum(step.what == "distillation" for step in seen) == 13:
            raise Killed

    times = ticks()
    with pytest.raises(Killed):
        compress(job(base, wanted, text), die, lambda: next(times))
    steps: list[Progress] = []
    run(job(base, wanted, text), steps)
    assert sum(step.what == "distillation" for step in steps) < 13
    one, two = (base.parent / name / "model.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == two.read_bytes()
