"""Steps that are recorded and run again give the tokens that the layers themselves give."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from engines.generation.engine import GenerationEngine
from engines.generation.recorded_steps import RecordedSteps
from engines.generation.runner import StepRunner
from engines.kernels.native import shared_native
from engines.models.batch import Batch
from tests.unit.generation.streams import Streams, mixed_items
from tests.unit.generation.tiny_models import DEEPSEEK, LLAMA, load_tiny, model_folder

INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
    "ignore": ["lm_head"],
}

pytestmark = pytest.mark.skipif(shared_native() is None, reason="steps are recorded where the library is")


def recorded_rows(engine: GenerationEngine) -> set[int]:
    assert engine._loaded is not None
    assert isinstance(engine._loaded.runner, StepRunner)
    recorded = engine._loaded.runner._recorded
    assert recorded is not None
    return recorded.rows


def tokens_of(folder: Path, **fields: Any) -> tuple[dict[int, list[int]], set[int]]:
    """What twelve requests got, and the sizes of steps that were recorded."""
    engine = load_tiny(folder, **fields)
    try:
        streams = Streams(engine)
        streams.offer(mixed_items(12, engine.info.vocab_size, random.Random(5)))
        streams.run()
        return streams.tokens, recorded_rows(engine)
    finally:
        engine.close()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_recorded_steps_give_the_same_tokens(tmp_path: Path, qk_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LLAMA | {"quantization_config": INT4}
    if qk_norm:
        config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
    folder = model_folder(tmp_path, config)
    tokens, rows = tokens_of(folder)
    assert {1, 4, 8} <= rows
    monkeypatch.setattr(RecordedSteps, "forward", lambda self, batch: None)
    assert tokens_of(folder) == (tokens, set())


def test_a_model_that_needs_more_than_native_calls_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[RecordedSteps] = []
    record = RecordedSteps._record

    def count(self: RecordedSteps, rows: int, batch: Batch) -> Any:
        attempts.append(self)
        return record(self, rows, batch)

    monkeypatch.setattr(RecordedSteps, "_record", count)
    tokens, rows = tokens_of(model_folder(tmp_path, DEEPSEEK))
    assert rows == set()
    # One by the load's own steps, one by the engine's.
    assert len(attempts) == 2
    assert attempts[0] is not attempts[1]
    monkeypatch.setattr(RecordedSteps, "forward", lambda self, batch: None)
    assert tokens_of(model_folder(tmp_path, DEEPSEEK))[0] == tokens
