"""Checkpoints that other tools wrote: the weights are what those tools read in them, bit by bit."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.kernels import Float8Matrix, IntegerMatrix, dense
from engines.manifest import read_manifest
from engines.models.loader import open_weights
from engines.models.weights import FileSource, Placement
from engines.protocol import EngineLoadError
from engines.quant.base import LinearPart
from tests.paged_rows import PagedRows
from tests.unit.models.checkpoints import CPU, load

FILES = Path(__file__).parent.parent / "data" / "quantized"
CASES = sorted(path.name for path in FILES.iterdir() if path.is_dir())
WIDTH, KV_WIDTH = 64, 32
PROMPT = [3, 17, 39, 4, 4, 20]


def test_all_cases_are_there() -> None:
    assert len(CASES) == 15


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_the_writing_library_reads(case: str) -> None:
    reader, methods = open_weights(read_manifest(FILES / case))
    source = FileSource(Placement(device=CPU, dtype=torch.float32), reader, lambda progress: None, total=1)
    expected = json.loads((FILES / case / "expected.json").read_text())
    assert len(expected) == 14
    for name, digest in expected.items():
        outputs = KV_WIDTH if name.endswith(("k_proj", "v_proj")) else WIDTH
        matrix = methods(name).create_weights(LinearPart(name, outputs), WIDTH, "none", source)
        assert isinstance(matrix, IntegerMatrix | Float8Matrix), name
        values = dense(matrix, getattr(torch, digest["dtype"]))
        assert hashlib.sha256(values.view(torch.int16).numpy().tobytes()).hexdigest() == digest["sha256"], name


@pytest.mark.parametrize("case", CASES)
def test_the_model_computes_with_these_weights(case: str, tmp_path: Path) -> None:
    """Against the same model with its weights dequantized; inputs of 8 bits make a difference, but not much of one."""
    manifest = read_manifest(FILES / case)
    model = load(manifest)
    result = PagedRows(model, 1, 8).step({0: PROMPT})[0]
    plain = PagedRows(load(read_manifest(dequantized(case, tmp_path))), 1, 8).step({0: PROMPT})[0]
    least = 0.95 if case.startswith(("fp8", "w8a8", "mixed")) else 0.999
    assert torch.nn.functional.cosine_similarity(result, plain).min() > least
    assert load(manifest).weight_bytes < load(read_manifest(tmp_path)).weight_bytes


def dequantized(case: str, folder: Path) -> Path:
    """A plain checkpoint of the same values."""
    reader, methods = open_weights(read_manifest(FILES / case))
    source = FileSource(Placement(device=CPU, dtype=torch.float32), reader, lambda progress: None, total=1)
    tensors = {}
    for name in json.loads((FILES / case / "expected.json").read_text()):
        outputs = KV_WIDTH if name.endswith(("k_proj", "v_proj")) else WIDTH
        matrix = methods(name).create_weights(LinearPart(name, outputs), WIDTH, "none", source)
        tensors[f"{name}.weight"] = dense(matrix, torch.float32)
    for name in reader.shapes.keys() - source.used:
        tensors[name] = source.take(name, reader.shapes[name], "none")
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((FILES / case / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def changed(folder: Path, case: str, tensors: dict[str, Any] | None = None, **quantization: Any) -> Path:
    """A copy of a case with other tensors, or None to leave one out, and other settings."""
    shutil.copytree(FILES / case, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(quantization)
    (folder / "config.json").write_text(json.dumps(config))
    stored = load_file(folder / "model.safetensors") | (tensors or {})
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, folder / "model.safetensors")
    return folder


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("case", "tensors", "message"),
    [
        ("int4-g32", {f"{LAYER}.weight_scale": None}, f"tensor {LAYER}.weight_scale is missing"),
        ("int4-g32", {f"{LAYER}.weight_packed": torch.zeros(64, 9, dtype=torch.int32)}, "has shape"),
        ("int4-g32", {f"{LAYER}.weight_packed": torch.zeros(64, 8)}, "is stored as float32 where .* asks for int32"),
        ("int4-g32", {f"{LAYER}.weight_shape": torch.tensor([64, 60])}, r"weight_shape says \[64, 60\]"),
        ("int4-g32", {f"{LAYER}.weight_zero_point": torch.zeros(8, 2)}, "does not use: .*weight_zero_point"),
        ("int4-g32", {"lm_head.weight_packed": torch.zeros(8, 2)}, "does not use: lm_head.weight_packed"),
        ("w8a8-dynamic", {f"{LAYER}.weight": torch.zeros(64, 64)}, "is stored as float32 where .* asks for int8"),
        ("w8a8-static", {f"{LAYER}.input_scale": None}, "input_scale is missing"),
        ("gptq-4", {f"{LAYER}.g_idx": torch.zeros(64, dtype=torch.int32)}, "does not share out the columns evenly"),
        ("gptq-4", {f"{LAYER}.g_idx": torch.arange(64, dtype=torch.int32)}, "does not share out the columns evenly"),
    ],
)
def test_a_damaged_file_is_refused(case: str, tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match=message):
        load(read_manifest(changed(tmp_path, case, tensors)))


def test_a_config_that_does_not_fit_the_file_is_refused(tmp_path: Path) -> None:
    folder = changed(tmp_path, "int4-g32", ignore=["lm_head", "re:.*up_proj"])
    with pytest.raises(EngineLoadError, match=r"up_proj\.weight is missing"):
        load(read_manifest(folder))


def test_codes_without_a_quantization_config_are_refused(tmp_path: Path) -> None:
    folder = changed(tmp_path, "w8a8-dynamic")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineLoadError, match="no quantization_config"):
        read_manifest(folder)
