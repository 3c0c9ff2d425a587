from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from compression.fingerprint import LONGEST, PROMPTS, make_fingerprint
from engines.engine_folder import EngineRecord, LogitFingerprint
from engines.generation.engine import GenerationEngine
from engines.generation.whole_prompts import WholePrompts
from engines.manifest import read_manifest
from engines.protocol import EngineLoadError, EngineSpec, LoadProgress
from tests.paged_rows import PagedRows
from tests.unit.compression.tiny_pair import write_pair, write_record
from tests.unit.models.checkpoints import CPU, load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pair(tmp_path)[0]


def spec(folder: Path, **fields: object) -> EngineSpec:
    values = {"name": "own", "source": str(folder), "threads": 1, "max_batch": 4, "max_step_tokens": 64}
    return msgspec.convert(values | fields, EngineSpec)


def load_engine(folder: Path, **fields: object) -> tuple[str, list[LoadProgress]]:
    """What the engine is, and its progress; it is closed again."""
    seen: list[LoadProgress] = []
    engine = GenerationEngine.load(spec(folder, **fields), seen.append)
    engine.close()
    return engine.info.fingerprint, seen


def with_fingerprint(folder: Path) -> EngineRecord:
    return write_record(folder, fingerprint=make_fingerprint(folder, CPU))


def damage(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def test_an_untouched_folder_is_verified_and_served(folder: Path, tmp_path: Path) -> None:
    record = with_fingerprint(folder)
    assert record.fingerprint is not None
    assert len(record.fingerprint.prompts) == len(PROMPTS) == 20
    assert all(1 <= len(prompt) <= LONGEST for prompt in record.fingerprint.prompts)
    remembered = str(tmp_path / "verified")
    _, seen = load_engine(folder, verified=remembered)
    assert [each.phase for each in seen].count("verify") > 0
    _, again = load_engine(folder, verified=remembered)
    assert "verify" not in [each.phase for each in again], "remembered"


def test_one_flipped_bit_refuses_the_load(folder: Path) -> None:
    with_fingerprint(folder)
    damage(folder)
    with pytest.raises(EngineLoadError, match=r"model\.safetensors is not what slimserve\.json says"):
        load_engine(folder)


def test_a_weight_file_of_another_name_refuses_the_load(folder: Path) -> None:
    record = with_fingerprint(folder)
    msgspec.structs.replace(record)
    (folder / "slimserve.json").write_bytes(
        msgspec.json.encode(msgspec.structs.replace(record, hashes={"other.safetensors": []}))
    )
    with pytest.raises(EngineLoadError, match=r"model\.safetensors is not one that the model was written with"):
        load_engine(folder)


def test_a_model_that_computes_something_else_refuses_the_load(folder: Path, tmp_path: Path) -> None:
    """Right files, wrong answers: as if a scale was ignored or tensors were dropped while loading."""
    record = with_fingerprint(folder)
    assert record.fingerprint is not None
    shifted = [[logprob - 0.6 for logprob in row] for row in record.fingerprint.logprobs]
    for logprobs, allowed in (
        (shifted, False),
        ([[float("nan")] * 8] * 20, False),
        (record.fingerprint.logprobs, True),
    ):
        changed = msgspec.structs.replace(record.fingerprint, logprobs=logprobs)
        write_record(folder, fingerprint=changed)
        if allowed:
            load_engine(folder)
            continue
        with pytest.raises(EngineLoadError, match=r"slimserve\.json is damaged|does not compute what it computed"):
            load_engine(folder)


def test_a_worker_s_restart_checks_nothing_again(folder: Path) -> None:
    with_fingerprint(folder)
    engine = GenerationEngine.load(spec(folder), lambda progress: None)
    engine.close()
    damage(folder)
    restarted = GenerationEngine.load(spec(folder, measured=engine.info.measured), lambda progress: None)
    restarted.close()


def test_bfloat16_is_within_its_tolerance(folder: Path) -> None:
    record = with_fingerprint(folder)
    assert record.fingerprint is not None
    assert {"cpu/float32", "cpu/bfloat16", "cuda/bfloat16"} <= record.fingerprint.tolerances.keys()
    load_engine(folder, dtype="bfloat16")


def test_a_fingerprint_of_a_larger_vocabulary_is_refused(folder: Path) -> None:
    fingerprint = LogitFingerprint(prompts=[[1]], tokens=[[99999]], logprobs=[[-1.0]], tolerances={})
    write_record(folder, fingerprint=fingerprint)
    with pytest.raises(EngineLoadError, match="larger vocabulary"):
        load_engine(folder)


def test_whole_prompts_give_what_single_tokens_give(folder: Path) -> None:
    model = load(read_manifest(folder))
    prompts = WholePrompts(model, CPU, torch.float32)
    sequences = [[5, 6, 7], [1], list(range(40)), [9, 9]]
    for chosen in (sequences, sequences[::-1], sequences[:1]):
        found = prompts.last_logprobs(chosen)
        rows = PagedRows(model, len(chosen), 40)
        expected = rows.step(dict(enumerate(chosen)))
        for index in range(len(chosen)):
            assert torch.allclose(found[index], expected[index][-1].log_softmax(-1), atol=1e-4)
