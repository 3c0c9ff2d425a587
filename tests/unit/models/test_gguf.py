"""GGUF files: the same values under the same names as in a safetensors folder, and damage told apart from crashes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from engines.gguf_header import read_gguf_header
from engines.kernels import dense
from engines.manifest import read_manifest
from engines.models.config import parse_config
from engines.models.loader import build_model, open_weights
from engines.models.weights import CountingSource, FileSource, Placement
from engines.protocol import EngineLoadError
from engines.quant.base import LinearPart
from tests.paged_rows import PagedRows
from tests.unit.models.checkpoints import CPU, load, record, write_config
from tests.unit.models.gguf_files import LLAMA, QWEN2, QWEN3, write_gguf

PROMPT = [3, 17, 39, 4, 4, 20]
KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
FAMILIES = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "llama-biases": {**LLAMA, "attention_bias": True}}


def logits(source: Path) -> torch.Tensor:
    return PagedRows(load(read_manifest(source)), 1, 8).step({0: PROMPT})[0]


def pair(tmp_path: Path, config: dict[str, Any], kind: Type, **metadata: Any) -> tuple[Path, Path]:
    """A GGUF file, and a safetensors folder with the values that it holds."""
    folder = tmp_path / "folder"
    tensors = record(folder, config).tensors
    stored = write_gguf(tmp_path / "tiny.gguf", config, tensors, kind, **metadata)
    assert kind is not Type.F32 or all(torch.equal(stored[name], tensors[name]) for name in tensors)
    save_file(stored, folder / "model.safetensors")
    return tmp_path / "tiny.gguf", folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_holds_what_the_package_reads(family: str, kind: str, tmp_path: Path) -> None:
    """Every tensor bit by bit; blocks are kept, so the model itself may round the inputs of its layers."""
    file, folder = pair(tmp_path, FAMILIES[family], Type[kind])
    reader, methods = open_weights(read_manifest(file))
    source = FileSource(Placement(device=CPU, dtype=torch.float32), reader, lambda progress: None, total=1)
    for name, values in load_file(folder / "model.safetensors").items():
        if values.ndim == 2:
            part = LinearPart(name.removesuffix(".weight"), values.shape[0])
            matrix = methods(part.name).create_weights(part, values.shape[1], "none", source)
            assert isinstance(matrix, torch.Tensor) == (kind in ("F32", "F16", "BF16")), name
            assert torch.equal(dense(matrix, torch.float32), values), name
        else:
            assert torch.equal(source.take(name, tuple(values.shape), "none"), values), name
    source.finish(lambda name: False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_gives_what_its_values_give(family: str, kind: str, tmp_path: Path) -> None:
    file, folder = pair(tmp_path, FAMILIES[family], Type[kind])
    result, expected = logits(file), logits(folder)
    assert result.std() > 0.01
    if kind in ("F32", "F16", "BF16"):
        assert torch.equal(result, expected)
    assert torch.nn.functional.cosine_similarity(result, expected).min() > 0.999


def test_metadata_has_the_names_of_config_json(tmp_path: Path) -> None:
    file, _ = pair(tmp_path, QWEN3, Type.Q8_0)
    manifest = read_manifest(file)
    assert (manifest.format, manifest.architecture, manifest.dtype) == ("gguf", "qwen3", "bfloat16")
    assert (manifest.max_context, manifest.vocab_size, manifest.bos_token_id) == (64, 40, 1)
    assert manifest.eos_token_ids == (2, 3)
    for key, value in QWEN3.items():
        assert manifest.config[key] == pytest.approx(value), key
    assert manifest.config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        (
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 16},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
        (
            {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"rope__scaling__type": "none"}, None),
    ],
    ids=["yarn", "linear", "none"],
)
def test_rope_scaling(metadata: dict[str, Any], scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    file, folder = pair(tmp_path, LLAMA, Type.F16, **metadata)
    write_config(folder, {**LLAMA, "rope_scaling": scaling})
    assert torch.equal(logits(file), logits(folder))


def test_llama3_rope_comes_as_a_tensor_of_divisors(tmp_path: Path) -> None:
    """Converters compute one divisor for each frequency from llama3's settings; both ways must give the same angles."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    folder = write_config(tmp_path / "folder", {**LLAMA, "rope_scaling": scaling})
    source = record(folder, {**LLAMA, "rope_scaling": scaling})
    save_file(source.tensors, folder / "model.safetensors")
    dim = LLAMA["hidden_size"] // LLAMA["num_attention_heads"]
    wavelengths = 2 * np.pi * LLAMA["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    kept = (32 / wavelengths - 1.0) / (4.0 - 1.0)
    divisors = np.where(wavelengths < 32 / 4, 1.0, np.where(wavelengths > 32, 8.0, 1 / ((1 - kept) / 8 + kept)))
    assert len(set(divisors)) > 3
    with_divisors = {**source.tensors, "rope_freqs.weight": torch.from_numpy(divisors.astype(np.float32))}
    write_gguf(tmp_path / "tiny.gguf", LLAMA, with_divisors, Type.F32)
    torch.testing.assert_close(logits(tmp_path / "tiny.gguf"), logits(folder), rtol=1e-4, atol=1e-4)


def test_unknown_tensor_is_named(tmp_path: Path) -> None:
    tensors = record(tmp_path / "folder", LLAMA).tensors
    write_gguf(
        tmp_path / "tiny.gguf", LLAMA, {**tensors, "model.layers.0.mlp.gate.weight": torch.zeros(8, 256)}, Type.F32
    )
    with pytest.raises(EngineLoadError, match=r"does not use: blk\.0\.ffn_gate_inp\.weight"):
        load(read_manifest(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize(
    ("arch", "metadata", "message"),
    [
        ("mamba", {}, "'mamba' is not supported in a .gguf file; llama, qwen2, qwen3"),
        ("llama", {"llama.expert_count": 8}, "with experts are not supported"),
        ("llama", {"split.count": 3}, "one part of a split file"),
        ("llama", {"llama.rope.dimension_count": 8}, "rope.dimension_count must be 32"),
        ("llama", {"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope' is not supported"),
        ("llama", {"llama.block_count": 0}, "llama.block_count must be a whole number"),
    ],
)
def test_refused_metadata(arch: str, metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", arch)
    whole = {
        f"{arch}.embedding_length": 256,
        f"{arch}.attention.head_count": 8,
        f"{arch}.feed_forward_length": 8,
        f"{arch}.block_count": 1,
        f"{arch}.context_length": 64,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        **metadata,
    }
    for key, value in whole.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 256), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(EngineLoadError, match=message) as caught:
        read_manifest(tmp_path / "tiny.gguf")
    assert str(tmp_path) not in str(caught.value)


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((1, 84), dtype=np.uint8), raw_dtype=Type.Q2_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(EngineLoadError, match=r"attn_q\.weight has the quantization type number 10.*Q4_K"):
        read_manifest(tmp_path / "tiny.gguf")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("tiny")
    tensors = record(folder, LLAMA).tensors
    write_gguf(folder / "tiny.gguf", LLAMA, tensors, Type.Q4_0)
    return (folder / "tiny.gguf").read_bytes()


def test_truncated_anywhere(tiny: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    draw = random.Random(2)
    sizes = [0, 3, 4, 7, 8, 20, *(draw.randrange(24, len(tiny)) for _ in range(60)), len(tiny) - 33]
    for size in sizes:
        path.write_bytes(tiny[:size])
        with pytest.raises(EngineLoadError, match=r"cut\.gguf is (damaged or was not downloaded in full|not a GGUF)"):
            read_manifest(path)


@pytest.mark.parametrize("value", [1 << 20, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("offset", [8, 16, 24], ids=["tensors", "keys", "length of a key"])
def test_huge_counts_cost_nothing(offset: int, value: int, tiny: bytes, tmp_path: Path) -> None:
    data = bytearray(tiny)
    data[offset : offset + 8] = value.to_bytes(8, "little")
    (tmp_path / "huge.gguf").write_bytes(data)
    with pytest.raises(EngineLoadError, match=r"huge\.gguf is damaged"):
        read_gguf_header(tmp_path / "huge.gguf")


def test_damaged_headers_never_raise_anything_else(tiny: bytes, tmp_path: Path) -> None:
    draw = random.Random(9)
    path = tmp_path / "damaged.gguf"
    header_end = tiny.index(b"output.weight") + 64
    outcomes = set()
    for _ in range(600):
        data = bytearray(tiny)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(4, header_end)] = draw.randrange(256)
        path.write_bytes(data)
        try:
            config = parse_config(read_manifest(path))
        except EngineLoadError:
            outcomes.add("refused")
        else:
            placement = Placement(device=CPU, dtype=torch.float32)
            assert build_model(config, CountingSource(placement), positions=1).weight_bytes > 0
            outcomes.add("read")
    assert outcomes == {"refused", "read"}
