"""What ``slimserve compress`` writes, loaded by ``transformers`` with compressed-tensors: the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compression.compress import Job, compress
from engines.kernels import quantized
from engines.manifest import read_manifest
from engines.models.config import parse_config
from tests.unit.api.harness import write_model
from tests.unit.compression.recipes import recipe
from tests.unit.models.checkpoints import load, write_checkpoint

pytest.importorskip("compressed_tensors", reason="the extra 'interop' is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
RULES: dict[str, list[dict[str, Any]]] = {
    "int8": [{"bits": 8}],
    "int8 inputs too": [{"bits": 8, "activations": "int8"}],
    "int4 groups": [{"bits": 4, "group_size": 32}],
    "int4 groups, zero points": [{"bits": 4, "group_size": 32, "symmetric": False}],
    "mixed": [{"match": ["*.self_attn.*"], "bits": 8}, {"match": ["*.mlp.*"], "bits": 4, "group_size": 32}],
    "float8": [{"kind": "float8", "activations": "float8"}],
}


TOLERANCES = {
    "int8 inputs too": 0.05,  # theirs spread a token's inputs over 255 steps, ours and vLLM's over 254
    "float8": 0.02,
    "int4 groups, zero points": 0.01,  # theirs rounds what it dequantizes to bfloat16
}
DEQUANTIZED = ("int4 groups, zero points",)
"""What transformers 5 with compressed-tensors 0.20 does not keep packed: it expects the zero points unpacked."""


@pytest.mark.parametrize("name", list(RULES))
def test_transformers_computes_the_same(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    # Without the fast kernels, which round inputs to 8 bits, products are what the format means.
    monkeypatch.setattr(quantized, "pack_native", lambda matrix: None)

    base = tmp_path / "base"
    write_model(base)
    config = json.loads((base / "config.json").read_text())
    write_checkpoint(base, {**config, "hidden_size": 64, "num_hidden_layers": 2})
    out = tmp_path / "out"
    compress(Job(base, "base", recipe(*RULES[name]), out), lambda step: None, lambda: 0.0)
    options = {}
    if name in DEQUANTIZED:
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **options)
    tokens = torch.arange(3, 35)
    with torch.no_grad():
        expected = theirs(tokens.unsqueeze(0)).logits[0]
    ours = logits(out, tokens)
    assert float((ours - expected).norm() / expected.norm()) < TOLERANCES.get(name, 2e-3)


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """As our engine's definition of the formats computes them."""
    from compression.layerwise import make_window

    manifest = read_manifest(folder)
    model, config = load(manifest), parse_config(manifest)
    window = make_window(tokens, config, torch.device("cpu"))
    return model.logits(model.forward(window.batch, [window.cache] * config.layers))
