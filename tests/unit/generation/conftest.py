from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.generation.engine import GenerationEngine
from tests.unit.generation.tiny_models import DEEPSEEK, LLAMA, load_tiny, model_folder


@pytest.fixture(scope="module", params=["llama", "deepseek"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models"), LLAMA if request.param == "llama" else DEEPSEEK)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[GenerationEngine]:
    engine = load_tiny(folder)
    yield engine
    engine.close()
