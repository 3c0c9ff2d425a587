"""The engines that the contract holds for. A further engine is one more line in ``ENGINES``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.protocol import Engine, EngineSpec, LoadProgress
from engines.registry import create
from tests.unit.generation.tiny_models import DEEPSEEK, LLAMA, model_folder, tiny_spec

MAX_MODEL_LEN = 96
MAX_ROWS = 6
MAX_STEP_TOKENS = 48

MakeSpec = Callable[[Path], EngineSpec]
"""Writes what the engine reads into an empty folder and returns the spec: in fp32, with the three sizes above."""


def fake(folder: Path) -> EngineSpec:
    return EngineSpec(
        name="m",
        kind="fake",
        max_model_len=MAX_MODEL_LEN,
        max_batch=MAX_ROWS,
        max_step_tokens=MAX_STEP_TOKENS,
    )


def llama(folder: Path) -> EngineSpec:
    return _generation(folder, LLAMA)


def deepseek(folder: Path) -> EngineSpec:
    return _generation(folder, DEEPSEEK)


def _generation(folder: Path, config: dict[str, Any]) -> EngineSpec:
    return tiny_spec(
        model_folder(folder, config),
        name="m",
        max_model_len=MAX_MODEL_LEN,
        max_batch=MAX_ROWS,
        max_step_tokens=MAX_STEP_TOKENS,
    )


ENGINES = [pytest.param(make_spec, id=make_spec.__name__) for make_spec in (fake, llama, deepseek)]


@pytest.fixture(scope="session", params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One engine for the whole session: what earlier tests left in slots and blocks must not matter."""
    make_spec: MakeSpec = request.param
    progress: list[LoadProgress] = []
    engine = create(make_spec(tmp_path_factory.mktemp("engine")), progress.append)
    assert progress, "the load reported nothing"
    yield engine
    engine.close()
