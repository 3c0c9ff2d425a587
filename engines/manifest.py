"""What a model is, read without torch and without running anything from it.

Both processes use it: the API process for limits, stop ids and sampling defaults, the engine for shapes and files.
A GGUF file's metadata comes out under the names that ``config.json`` has.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from engines.fields import Fields
from engines.gguf_config import read_gguf_config, read_gguf_quantization
from engines.gguf_header import read_gguf_header
from engines.protocol import EngineLoadError
from engines.quantization import Quantization
from engines.quantization_config import read_quantization
from engines.safetensors_header import SafetensorsHeader, read_safetensors_header

Architecture = Literal["llama", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3"]
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
LARGEST_JSON = 64 << 20
"""Bytes. The index of the largest checkpoints has some 10 MB."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One model on this machine."""

    source: Path
    """The folder or the ``.gguf`` file."""
    format: Literal["safetensors", "gguf"]
    architecture: Architecture
    config: dict[str, Any]
    """By the key names of ``config.json``, whatever the format."""
    dtype: str
    """Of the stored weights: float32, float16 or bfloat16; of quantized ones what they were before, or bfloat16."""
    quantization: Quantization | None = None
    """How the layers' weights are stored; None: as plain floats."""
    max_context: int
    """Longest sequence in tokens that the positions allow."""
    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Any of them ends an answer."""
    sampling_defaults: dict[str, float]
    """What applies where a request is silent; only the keys that the model's maker set."""
    files: tuple[Path, ...]
    """Weight files; empty for random weights."""
    fingerprint: str
    """Hex. Two models with the same one have, for all we can see without reading all bytes, the same weights."""


def read_manifest(source: Path, random_weights: bool = False) -> Manifest:
    """Read what ``source`` is: a Hugging Face folder or a ``.gguf`` file. Takes about 0.1 s.

    With ``random_weights`` only the folder's ``config.json`` is needed. Raises EngineLoadError, whose text says what
    is wrong and what to do, for everything that cannot be served.
    """
    if source.is_dir():
        return _read_folder(source, random_weights)
    if not source.is_file():
        raise EngineLoadError(f"{source.name}: there is no such file or folder")
    if source.suffix != ".gguf":
        raise EngineLoadError(f"{source.name} is neither a folder nor a .gguf file; give one of these")
    if random_weights:
        raise EngineLoadError(f"{source.name}: random weights need a folder with a config.json, not a .gguf file")
    return _read_gguf(source)


def _read_gguf(path: Path) -> Manifest:
    header = read_gguf_header(path)
    config = read_gguf_config(path, header)
    fields = Fields(config, path.name)
    kinds = {tensor.type for tensor in header.tensors.values() if len(tensor.shape) > 1}
    unquantized = {"F32": "float32", "F16": "float16"}
    return Manifest(
        source=path,
        format="gguf",
        architecture=_architecture(fields),
        config=config,
        dtype=unquantized.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16",
        quantization=read_gguf_quantization(header),
        max_context=_max_context(fields),
        vocab_size=fields.count("vocab_size"),
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=fields.token_ids("eos_token_id"),
        sampling_defaults=_sampling_defaults(_generation_config(path.parent)),
        files=(path,),
        fingerprint=_fingerprint(config, [(path, header.digest)]),
    )


def _read_folder(folder: Path, random_weights: bool) -> Manifest:
    if (folder / "adapter_config.json").exists():
        raise EngineLoadError(
            f"{folder.name} holds an adapter (adapter_config.json), which is no model by itself; "
            "merge it into its base model and serve the result"
        )
    if not (folder / "config.json").exists():
        raise EngineLoadError(f"{folder.name} has no config.json: {_what_else(folder)}")
    config = read_json(folder / "config.json")
    fields = Fields(config, "config.json")
    architecture = _architecture(fields)
    quantization = read_quantization(fields)
    headers = {} if random_weights else read_headers(folder)
    generation = _generation_config(folder)
    ends = (*generation.token_ids("eos_token_id"), *fields.token_ids("eos_token_id"))
    starts = (*generation.token_ids("bos_token_id"), *fields.token_ids("bos_token_id"))
    return Manifest(
        source=folder,
        format="safetensors",
        architecture=architecture,
        config=config,
        dtype=_stored_dtype(fields, headers, quantization is not None),
        quantization=quantization,
        max_context=_max_context(fields),
        vocab_size=fields.count("vocab_size"),
        bos_token_id=starts[0] if starts else None,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        sampling_defaults=_sampling_defaults(generation),
        files=tuple(headers),
        fingerprint=_fingerprint(config, [(path, header.digest) for path, header in headers.items()]),
    )


def _generation_config(folder: Path) -> Fields:
    path = folder / "generation_config.json"
    return Fields(read_json(path) if path.exists() else {}, path.name)


def _what_else(folder: Path) -> str:
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if files:
        return f"to serve {files[0]}, give the file itself"
    return "give the folder of a Hugging Face model, or a .gguf file"


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file of at most LARGEST_JSON bytes. Raises EngineLoadError."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise EngineLoadError(f"{path.name} is larger than {LARGEST_JSON >> 20} MB; it is not what it should be")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise EngineLoadError(f"{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise EngineLoadError(f"{path.name} is not valid JSON; fetch it again") from error
    if not isinstance(value, dict):
        raise EngineLoadError(f"{path.name} must hold an object")
    return value


def _architecture(fields: Fields) -> Architecture:
    known: tuple[Architecture, ...] = get_args(Architecture)
    kind = fields.text("model_type")
    match = next((name for name in known if name == kind), None)
    if match is None:
        raise EngineLoadError(f"{fields.name}: the architecture {kind[:80]!r} is not supported; {', '.join(known)} are")
    classes = fields.texts("architectures")
    if classes and not any(name.endswith("ForCausalLM") for name in classes):
        raise EngineLoadError(f"{fields.name}: {classes[0][:80]} does not generate text; a ...ForCausalLM does")
    return match


def _max_context(fields: Fields) -> int:
    """``max_position_embeddings``, or more where yarn stretches the positions that the model was trained with."""
    positions = fields.count("max_position_embeddings")
    scaling = rope_section(fields)
    if scaling.text("rope_type", scaling.text("type", "default")) != "yarn":
        return positions
    trained = scaling.count("original_max_position_embeddings", positions)
    return max(positions, int(trained * scaling.number("factor", 1.0)))


def rope_section(fields: Fields) -> Fields:
    """The part of the config that holds the rope settings: ``rope_parameters`` or the older ``rope_scaling``."""
    return fields.section("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")


def read_headers(folder: Path) -> dict[Path, SafetensorsHeader]:
    """Headers of all weight files in order, checked to be complete and to name each tensor once.

    Raises EngineLoadError.
    """
    headers = {path: read_safetensors_header(path) for path in _weight_files(folder)}
    owners: dict[str, str] = {}
    for path, header in headers.items():
        for name in header.tensors:
            if name in owners:
                raise EngineLoadError(f"tensor {name} is in both {owners[name]} and {path.name}; remove one file")
            owners[name] = path.name
    return headers


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(Fields(read_json(index), index.name).section("weight_map").values.values())
    elif (folder / "model.safetensors").exists():
        names = {"model.safetensors"}
    else:
        names = {path.name for path in folder.glob("*.safetensors")}
        names |= _all_parts(names)
    if not names:
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise EngineLoadError(
                f"{folder.name} has its weights as pickle files (.bin, .pt), which can run code when they are read and "
                "are never opened; convert the model to safetensors"
            )
        raise EngineLoadError(f"{folder.name} has no .safetensors file; fetch the model again")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise EngineLoadError(f"{index.name} names a weight file that is no plain .safetensors file name")
        if not (folder / name).exists():
            raise EngineLoadError(f"the weight file {name} is missing; fetch the model again")
    return [folder / name for name in sorted(names)]


def _all_parts(names: set[str]) -> set[str]:
    """Every file that names like model-00001-of-00003.safetensors say there must be."""
    parts = set()
    for name in names:
        match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.safetensors", name)
        if match:
            stem, total = match.groups()
            parts |= {f"{stem}-{part:05}-of-{total}.safetensors" for part in range(1, int(total) + 1)}
    return parts


def _stored_dtype(fields: Fields, headers: dict[Path, SafetensorsHeader], quantized: bool) -> str:
    """What most weights are stored as; of quantized weights and without files what the config says."""
    sizes: dict[str, int] = {}
    for header in headers.values():
        for tensor in header.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    if sizes and not quantized:
        stored = max(sizes, key=lambda dtype: sizes[dtype])
        name = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(stored)
        if name is None:
            raise EngineLoadError(
                f"the weights are stored as {stored}, and config.json has no quantization_config that says how to read "
                "them; F32, F16 and BF16 are read without"
            )
        return name
    name = fields.text("dtype", fields.text("torch_dtype", "bfloat16" if quantized else "float32"))
    if name not in ("float32", "float16", "bfloat16"):
        raise EngineLoadError(f"{fields.name}: dtype {name[:40]!r} is not supported; float32, float16, bfloat16 are")
    return name


def _sampling_defaults(generation: Fields) -> dict[str, float]:
    defaults = {}
    for key in SAMPLING_KEYS:
        value = generation.values.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise generation.fail(key, "a number from 0 up")
        defaults[key] = value
    return defaults


def _fingerprint(config: dict[str, Any], files: list[tuple[Path, bytes]]) -> str:
    """Over the config, and each file's name, size and header: fast, where hashing all bytes would take minutes."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for path, header in files:
        digest.update(json.dumps([path.name, path.stat().st_size]).encode())
        digest.update(header)
    return digest.hexdigest()
