"""``slimserve.json``: written, read, and each way in which it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engines.engine_folder import (
    FILE_NAME,
    LARGEST_RECORD,
    ClassCoverage,
    Coverage,
    EngineRecord,
    LogitFingerprint,
    Quality,
    read_engine_record,
    write_engine_record,
)
from engines.protocol import EngineLoadError

RECORD = EngineRecord(
    recipe={"preset": "int4-g64"},
    base="smollm2",
    created_with="slimserve 1",
    notes=["model.layers.0.mlp.down_proj: groups of 32"],
    coverage=Coverage(
        classes={"mlp": ClassCoverage(parameters=100, quantized_parameters=90, bytes=60, quantized_bytes=50)},
        promised={"mlp": 0.9},
    ),
    hashes={"model.safetensors": ["ab" * 32]},
    fingerprint=LogitFingerprint(
        prompts=[[1, 2]], tokens=[[5, 6]], logprobs=[[-0.5, -2.0]], tolerances={"cpu/float32": 0.01}
    ),
    quality=Quality(perplexity_ratio=1.01),
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_engine_record(tmp_path) is None
    write_engine_record(tmp_path, RECORD)
    assert read_engine_record(tmp_path) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


REFUSED: dict[str, tuple[list[str], Any, str]] = {
    "version": (["version"], 2, "another version"),
    "unknown key": (["experts"], 1, "another version"),
    "digest": (["hashes"], {"model.safetensors": ["ab"]}, "damaged"),
    "path": (["hashes"], {"../other": ["ab" * 32]}, "its own folder"),
    "share": (["coverage", "promised"], {"mlp": 1.5}, "damaged"),
    "class": (["coverage", "promised"], {"mlps": 0.5}, "damaged"),
    "fingerprint": (["fingerprint", "logprobs"], [[-0.5]], "do not belong together"),
    "missing prompt": (["fingerprint", "prompts"], [], "do not belong together"),
    "tolerance": (["fingerprint", "tolerances"], {"cpu/float32": 0}, "damaged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    keys, value, message = REFUSED[case]
    write_engine_record(tmp_path, RECORD)
    whole = json.loads((tmp_path / FILE_NAME).read_text())
    place = whole
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / FILE_NAME).write_text(json.dumps(whole))
    with pytest.raises(EngineLoadError, match=message) as caught:
        read_engine_record(tmp_path)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(EngineLoadError, match="damaged"):
        read_engine_record(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / FILE_NAME).open("wb") as file:
        file.truncate(LARGEST_RECORD + 1)
    with pytest.raises(EngineLoadError, match="larger than 16 MB"):
        read_engine_record(tmp_path)
