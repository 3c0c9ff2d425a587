"""What a folder or file is, and each way in which it is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.manifest import read_manifest
from engines.protocol import EngineLoadError
from engines.safetensors_header import read_safetensors_header

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "torch_dtype": "bfloat16",
    "vocab_size": 1000,
    "hidden_size": 8,
    "max_position_embeddings": 4096,
    "bos_token_id": 5,
    "eos_token_id": 7,
}


def safetensors(tensors: dict[str, tuple[str, list[int], int]]) -> bytes:
    """A file of zeros; each tensor is (dtype, shape, bytes)."""
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(end)


WEIGHTS = safetensors({"a": ("BF16", [2, 4], 16), "b": ("F32", [3], 12)})


def write(folder: Path, **files: Any) -> Path:
    """Files by name with dots as double underscores; dicts become JSON."""
    for key, content in files.items():
        path = folder / key.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, config__json=CONFIG, model__safetensors=WEIGHTS)


def test_folder(folder: Path) -> None:
    generation = {"eos_token_id": [9, 7], "temperature": 0.6, "top_p": 0.95, "top_k": None, "do_sample": True}
    manifest = read_manifest(write(folder, generation_config__json=generation))
    assert (manifest.format, manifest.architecture, manifest.dtype) == ("safetensors", "qwen2", "bfloat16")
    assert (manifest.max_context, manifest.vocab_size, manifest.bos_token_id) == (4096, 1000, 5)
    assert manifest.eos_token_ids == (9, 7)
    assert manifest.sampling_defaults == {"temperature": 0.6, "top_p": 0.95}
    assert manifest.files == (folder / "model.safetensors",)
    assert manifest.config["hidden_size"] == 8


def test_random_weights_need_only_the_config(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, config__json=CONFIG), random_weights=True)
    assert manifest.files == ()
    assert manifest.dtype == "bfloat16"
    assert manifest.sampling_defaults == {}


def test_the_reader_leaves_torch_unloaded(folder: Path) -> None:
    code = (
        "import sys, pathlib, engines.manifest as m; m.read_manifest(pathlib.Path(sys.argv[1]));"
        "assert not {'torch', 'gguf', 'numpy', 'safetensors'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "yarn", "factor": 2.0}, 8192),
        ({"rope_type": "linear", "factor": 2.0}, 4096),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 1024}, 4096),
    ],
)
def test_max_context(scaling: dict[str, Any], expected: int, tmp_path: Path) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        write(tmp_path, config__json={**CONFIG, key: scaling})
        assert read_manifest(tmp_path, random_weights=True).max_context == expected


def test_the_fingerprint_follows_what_is_there(folder: Path) -> None:
    def fingerprint() -> str:
        return read_manifest(folder).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    write(folder, config__json={**CONFIG, "rope_theta": 5.0})
    changed_config = fingerprint()
    write(folder, model__safetensors=safetensors({"a": ("BF16", [4, 2], 16), "b": ("F32", [3], 12)}))
    changed_header = fingerprint()
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert len({first, changed_config, changed_header, fingerprint()}) == 4


def test_shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(EngineLoadError, match=r"model-00002-of-00002\.safetensors is missing"):
        read_manifest(folder)
    second = safetensors({"c": ("BF16", [1], 2)})
    (folder / "model-00002-of-00002.safetensors").write_bytes(second)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [path.name for path in read_manifest(folder).files] == names
    index = {"weight_map": {"a": names[0], "b": names[0], "c": names[1], "d": "model-00003-of-00003.safetensors"}}
    write(folder, model__safetensors__index__json=index)
    with pytest.raises(EngineLoadError, match=r"model-00003-of-00003\.safetensors is missing; fetch the model again"):
        read_manifest(folder)


def _config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: write(folder, config__json={**CONFIG, **changes})


def _cut(size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").write_bytes(WEIGHTS[:size])


def _without(name: str) -> Callable[[Path], Path]:
    def remove(folder: Path) -> Path:
        (folder / name).unlink()
        return folder

    return remove


def _pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "adapter": (lambda folder: write(folder, adapter_config__json={}), "merge it into its base model"),
    "no config": (_without("config.json"), "has no config.json"),
    "gguf in a folder": (
        lambda folder: write(_without("config.json")(folder), tiny__gguf=b""),
        "to serve tiny.gguf, give the file itself",
    ),
    "config is not JSON": (lambda folder: write(folder, config__json=b"{"), "config.json is not valid JSON"),
    "config is nested": (lambda folder: write(folder, config__json=b"[" * 200_000), "not valid JSON"),
    "config is a list": (lambda folder: write(folder, config__json=[]), "must hold an object"),
    "architecture": (_config(model_type="mamba"), "'mamba' is not supported; llama, qwen2"),
    "no architecture": (_config(model_type=None), "model_type must be a string"),
    "classifier": (_config(architectures=["Qwen2ForSequenceClassification"]), "does not generate text"),
    "quantized": (_config(quantization_config={"quant_method": "hqq"}), "quantized by 'hqq'.* bfloat16 version"),
    "vocabulary": (_config(vocab_size=-1), "vocab_size must be a whole number"),
    "positions": (_config(max_position_embeddings="many"), "max_position_embeddings must be a whole number"),
    "end token": (_config(eos_token_id=[1, -3]), "eos_token_id must be a token id"),
    "pickles": (_pickles_only, "pickle files.* convert the model to safetensors"),
    "no weights": (_without("model.safetensors"), "no .safetensors file"),
    "index leaves the folder": (
        lambda folder: write(folder, model__safetensors__index__json={"weight_map": {"a": "../x.safetensors"}}),
        "names a weight file that is no plain",
    ),
    "weights end in the prefix": (_cut(5), "was not downloaded in full"),
    "weights end in the header": (_cut(40), "ends past the end of the file"),
    "weights end in the data": (_cut(len(WEIGHTS) - 1), "was not downloaded in full"),
    "sampling default": (
        lambda folder: write(folder, generation_config__json={"temperature": "hot"}),
        "generation_config.json: temperature must be a number",
    ),
    "int8 weights": (
        lambda folder: write(folder, model__safetensors=safetensors({"a": ("I8", [4], 4)})),
        "stored as I8",
    ),
    "twice": (
        lambda folder: [
            write(folder, x__safetensors=WEIGHTS),
            (folder / "model.safetensors").rename(folder / "y.safetensors"),
        ],
        "tensor a is in both x.safetensors and y.safetensors",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, folder: Path) -> None:
    damage, message = REFUSED[case]
    damage(folder)
    with pytest.raises(EngineLoadError, match=message) as caught:
        read_manifest(folder)
    assert str(folder.parent) not in str(caught.value)


def test_neither_folder_nor_gguf(tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match="no such file or folder"):
        read_manifest(tmp_path / "nothing")
    write(tmp_path, model__onnx=b"")
    with pytest.raises(EngineLoadError, match=r"neither a folder nor a \.gguf file"):
        read_manifest(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 70]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]},
        {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        7,
    ],
)
def test_safetensors_header_that_contradicts_itself(entry: Any, tmp_path: Path) -> None:
    raw = json.dumps({"a": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(EngineLoadError, match="entry for a is wrong"):
        read_safetensors_header(tmp_path / "x.safetensors")


def test_damaged_safetensors_headers_never_raise_anything_else(tmp_path: Path) -> None:
    draw = random.Random(5)
    path = tmp_path / "x.safetensors"
    for _ in range(500):
        data = bytearray(WEIGHTS)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            read_safetensors_header(path)
        except EngineLoadError:
            continue
