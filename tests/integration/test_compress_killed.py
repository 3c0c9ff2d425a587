"""The command itself, killed by the signal that nothing can catch, and given again."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from benchmarks.servers import slimserve
from tests.unit.api.harness import write_model
from tests.unit.compression.jobs import TEXT
from tests.unit.models.checkpoints import write_checkpoint

LAYERS = 24
RECIPE = """
layers: [{match: ["*"], bits: 4, group_size: 16, symmetric: false, method: gptq}]
scaling: {rule: awq}
calibration: {windows: 8, tokens: 32}
"""
WAIT_S = 120.0


def done(partial: Path) -> set[str]:
    return {path.name for path in partial.glob("layer-*.safetensors")}


def test_a_killed_command_goes_on_where_it_was(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_model(base)
    config = json.loads((base / "config.json").read_text())
    write_checkpoint(base, {**config, "num_hidden_layers": LAYERS, "tie_word_embeddings": False})
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text(TEXT)

    options = ("--recipe", "recipe.yaml", "--calibration", "text.txt", "--threads", "1", "--no-card", "--out", "out")
    command = slimserve("compress", str(base), *options)
    partial = tmp_path / "out.partial"
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as killed:
        deadline = time.monotonic() + WAIT_S
        while len(done(partial)) < 2 and killed.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        killed.kill()
    assert 2 <= len(done(partial)) < LAYERS
    assert not (tmp_path / "out").exists()
    again = subprocess.run(command, cwd=tmp_path, check=True, timeout=WAIT_S, capture_output=True, text=True)
    said = again.stdout + again.stderr
    assert f"layer {LAYERS} of {LAYERS}" in said
    assert "layer 1 of" not in said
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not partial.exists()
