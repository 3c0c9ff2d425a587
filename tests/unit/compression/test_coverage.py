from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from compression.coverage import check_promises, count_coverage, coverage_lines, layer_class
from compression.errors import CompressionError
from engines.engine_folder import Coverage
from engines.manifest import Manifest, read_manifest
from engines.protocol import EngineLoadError
from tests.unit.models.checkpoints import FAMILIES, write_checkpoint


def written(folder: Path, family: str) -> tuple[Path, Manifest]:
    write_checkpoint(folder, FAMILIES[family])
    return folder / "model.safetensors", read_manifest(folder)


def quantize(path: Path, wanted: str) -> int:
    """Store matrices whose names contain ``wanted`` as int8 codes with scales; returns how many parameters."""
    tensors, count = load_file(path), 0
    for name in [name for name, tensor in tensors.items() if wanted in name and tensor.dim() == 2]:
        weight = tensors.pop(name)
        count += weight.numel()
        layer = name.removesuffix(".weight")
        tensors[f"{layer}.weight_packed"] = torch.zeros((weight.shape[0], weight.shape[1] // 8), dtype=torch.int32)
        tensors[f"{layer}.weight_scale"] = torch.zeros((weight.shape[0], 2), dtype=torch.bfloat16)
        tensors[f"{layer}.weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, path)
    return count


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_parameter_and_byte_of_an_unquantized_model_is_counted(tmp_path: Path, family: str) -> None:
    path, manifest = written(tmp_path / family, family)
    tensors = load_file(path)
    coverage = count_coverage(manifest)
    assert sum(part.parameters for part in coverage.classes.values()) == sum(each.numel() for each in tensors.values())
    assert sum(part.bytes for part in coverage.classes.values()) == sum(each.nbytes for each in tensors.values())
    assert all(part.quantized_parameters == part.quantized_bytes == 0 for part in coverage.classes.values())
    moe = {"routed", "shared", "router"}
    assert moe <= coverage.classes.keys() if "deepseek" in family else not moe & coverage.classes.keys()


def test_what_is_quantized_is_found_in_the_files(tmp_path: Path) -> None:
    path, manifest = written(tmp_path / "m", "deepseek_v3")
    before = count_coverage(manifest)
    quantized = quantize(path, ".mlp.experts.")
    after = count_coverage(manifest)
    routed = after.classes["routed"]
    assert routed.parameters == routed.quantized_parameters == quantized == before.classes["routed"].parameters
    assert routed.bytes == routed.quantized_bytes < before.classes["routed"].bytes / 2
    for name in before.classes.keys() - {"routed"}:
        assert after.classes[name] == before.classes[name]


def test_a_missed_expert_breaks_the_promise(tmp_path: Path) -> None:
    path, manifest = written(tmp_path / "m", "deepseek_v3")
    quantize(path, ".mlp.experts.1.")
    coverage = count_coverage(manifest, {"routed": 0.9, "attention": 0.0})
    with pytest.raises(CompressionError, match=r"routed: 12\.5% of the parameters, 90\.0% promised"):
        check_promises(coverage)
    check_promises(msgspec.structs.replace(coverage, promised={"routed": 0.125}))


def test_a_class_that_the_model_lacks_promises_nothing() -> None:
    check_promises(Coverage(classes={}, promised={"routed": 1.0}))


def test_a_part_that_is_in_no_file_is_an_error(tmp_path: Path) -> None:
    path, manifest = written(tmp_path / "m", "llama")
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(EngineLoadError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is in no file"):
        count_coverage(manifest)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_a_layernorm.weight", "norm"),
        ("model.layers.3.self_attn.q_norm.weight", "norm"),
        ("model.norm.weight", "norm"),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", "attention"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "router"),
        ("model.layers.3.mlp.gate_proj.weight", "mlp"),
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", "shared"),
        ("model.layers.3.mlp.experts.11.down_proj.weight", "routed"),
        ("lm_head.weight", "head"),
    ],
)
def test_classes_of_names(name: str, expected: str) -> None:
    assert layer_class(name) == expected


def test_lines_for_people(tmp_path: Path) -> None:
    path, manifest = written(tmp_path / "m", "llama")
    quantize(path, ".self_attn.")
    (line,) = [line for line in coverage_lines(count_coverage(manifest)) if line.startswith("attention")]
    assert "100.0% quantized" in line
