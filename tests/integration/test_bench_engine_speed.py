"""``benchmarks.engine_speed`` in a short form: the tiny model on the CPU, offline, over HTTP and from a cold start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.report import ROOT


def test_all_parts_on_a_machine_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.engine_speed", "--models", "tiny", "--dtype", "float32"]
    command += ["--columns", "b1", "b64", "prefill", "--repeats", "1", "--http", "--start", "--output", str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=ROOT, check=False)
    assert answer.returncode == 0, answer.stderr
    (path,) = tmp_path.glob("engine_speed_*.json")
    found = json.loads(path.read_text())["models"]["tiny float32"]
    assert list(found["columns"]) == ["b1", "b64", "prefill", "b64 http"]
    alone, many, prefill = (found["columns"][name] for name in ("b1", "b64", "prefill"))
    assert alone["steps"] >= 256
    assert many["tokens_per_second"] > alone["tokens_per_second"] > 0
    assert 0 < alone["floor_ms"] < alone["decode_ms"]
    assert prefill["decode_ms"] is None
    assert found["columns"]["b64 http"]["offline_tokens_per_second"] == many["tokens_per_second"]
    for phases in (found["start"]["cold"], found["start"]["warm"]):
        assert 0 < phases["http_bound"] < phases["ready"] < phases["first_token"]
        assert phases["weights_read"] <= phases["ready"]
    assert "verdict" in answer.stdout
