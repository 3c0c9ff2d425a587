from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.manifest import Manifest
from tests.unit.api.harness import THINKING, close_texts, write_model


@pytest.fixture(scope="session", autouse=True)
def _texts_are_closed() -> Iterator[None]:
    yield
    close_texts()


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def thinking_manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_model(tmp_path_factory.mktemp("thinking"), THINKING)


@pytest.fixture(scope="session")
def untemplated_manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder: Path = tmp_path_factory.mktemp("untemplated")
    return write_model(folder, None, {"temperature": 0.25, "top_k": 40})
