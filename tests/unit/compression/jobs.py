"""Runs of the command as tests make them: of a tiny model, with a clock that counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from compression.compress import Job, compress
from compression.layerwise import make_window
from compression.progress import Progress
from compression.recipe import Recipe
from engines.manifest import read_manifest
from engines.models.config import parse_config
from tests.unit.compression.recipes import recipe
from tests.unit.models.checkpoints import load, write_checkpoint

TEXT = "The quick brown fox jumps over the lazy dog while seven wizards brew a potion.\n" * 60
INT8 = recipe({"bits": 8})
GPTQ = recipe(
    {"bits": 4, "group_size": 16, "method": "gptq"}, scaling={"rule": "awq"}, calibration={"windows": 4, "tokens": 32}
)
DISTILLATION = {"steps": 16, "windows_per_step": 2, "learning_rate": 0.002}


def compensated(compensation: dict[str, Any], **fields: Any) -> Recipe:
    """GPTQ at 3 bits, without and with what comes after it."""
    rule = {"bits": 3, "group_size": 16, "symmetric": False, "method": "gptq"}
    return recipe(rule, calibration={"windows": 8, "tokens": 32}, compensation=compensation, **fields)


def distilled(distillation: dict[str, Any]) -> Recipe:
    rule = {"bits": 3, "group_size": 16, "symmetric": False, "method": "gptq"}
    return recipe(rule, calibration={"windows": 9, "tokens": 32}, distillation=distillation)


def write_checkpoint_of(folder: Path, config: dict[str, Any]) -> None:
    (folder / "model.safetensors").unlink()
    write_checkpoint(folder, config)


def ticks() -> Iterator[float]:
    now = 0.0
    while True:
        now += 1.0
        yield now


def run(job: Job, steps: list[Progress] | None = None) -> list[str]:
    times = ticks()
    return compress(job, (steps if steps is not None else []).append, lambda: next(times))


def job(base: Path, wanted: Recipe, text: Path | None = None, name: str = "out") -> Job:
    return Job(model=base, name="base", recipe=wanted, out=base.parent / name, calibration=text)


def logits(folder: Path) -> torch.Tensor:
    """Of the beginning of the text, whose tokens are its bytes, as the engine computes them."""
    manifest = read_manifest(folder)
    model, config = load(manifest), parse_config(manifest)
    window = make_window(torch.tensor(list(TEXT[:48].encode())), config, torch.device("cpu"))
    return model.logits(model.forward(window.batch, [window.cache] * config.layers))


def difference(folder: Path, base: Path) -> float:
    ours, exact = logits(folder), logits(base)
    return float((ours - exact).norm() / exact.norm())


class Killed(BaseException):
    """Stands for a signal."""
