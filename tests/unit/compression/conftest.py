from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.api.harness import write_model
from tests.unit.compression.jobs import TEXT, write_checkpoint_of
from tests.unit.models.checkpoints import DEEPSEEK_V2, write_checkpoint


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    write_model(folder)
    config = json.loads((folder / "config.json").read_text())
    write_checkpoint(folder, {**config, "num_hidden_layers": 2, "tie_word_embeddings": False})
    return folder


@pytest.fixture
def experts(base: Path) -> Path:
    """A model with eight routed experts."""
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    config = {**DEEPSEEK_V2, "vocab_size": vocabulary, "max_position_embeddings": 256}
    write_checkpoint_of(base, config)
    return base


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path
