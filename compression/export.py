"""The engine folder: weight files, config and tokenizer, as a Hugging Face folder that other servers read too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compression.calibrated_layer import LayerWeights
from compression.plan import LayerPlan
from compression.stored_formats import stored_tensors
from engines.manifest import Manifest
from server.text.gguf_tokenizer import UNKNOWN_PIECE, read_gguf_text
from server.text.source import TextSource

SHARD_BYTES = 2 << 30
"""At most so much in one weight file, unless one layer alone has more."""
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "LICENSE",
)
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Of architectures that come as GGUF files, which do not say it."""


def layer_tensors(weights: LayerWeights, plan: Mapping[str, LayerPlan], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a decoder layer's file holds, on the CPU: matrices in ``dtype`` where they are not quantized; vectors and
    routers, which are small and decide much, in float32."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in weights.tensors.items():
        linear = name.removesuffix(".weight")
        matrix = weights.quantized.get(linear)
        if matrix is not None:
            parts = stored_tensors(matrix, plan[linear].scheme)
            tensors |= {f"{linear}.{suffix}": part.cpu().contiguous() for suffix, part in parts.items()}
        else:
            small = tensor.dim() == 1 or linear.endswith(".mlp.gate")
            tensors[name] = tensor.to(torch.float32 if small else dtype).cpu().contiguous()
    return tensors


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], notes: list[str]) -> None:
    """Write the file in one step: after a kill it is there whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": "pt", "notes": json.dumps(notes)})
    partial.replace(path)


def read_notes(path: Path) -> list[str]:
    """As they were given to ``save_tensors``."""
    with safe_open(path, framework="pt") as file:
        notes: list[str] = json.loads((file.metadata() or {}).get("notes", "[]"))
    return notes


def write_shards(files: Iterable[Path], folder: Path) -> list[Path]:
    """Join files of layers into ``model*.safetensors``, with the index that several need. Memory: one shard."""
    shards: list[list[Path]] = [[]]
    size = 0
    for path in files:
        if size + path.stat().st_size > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(path)
        size += path.stat().st_size
    written: list[Path] = []
    weight_map: dict[str, str] = {}
    total = 0
    for place, members in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{place:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for path in members:
            with safe_open(path, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no dict)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # as other files are; the library makes it private
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        written.append(folder / name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    return written


def write_config(
    manifest: Manifest, quantization: dict[str, Any], dtype: torch.dtype, folder: Path, mlp_bias: bool = False
) -> None:
    """``config.json``: the base's, with the new weights' type and format; ``mlp_bias``: feed-forwards have biases."""
    config = {key: value for key, value in manifest.config.items() if value is not None and key != "torch_dtype"}
    if manifest.format == "gguf":
        config |= {"architectures": [CLASSES[manifest.architecture]], "mlp_bias": False}
        if config.get("eos_token_id") and len(config["eos_token_id"]) == 1:
            config["eos_token_id"] = config["eos_token_id"][0]
    if mlp_bias:
        config["mlp_bias"] = True
    config |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": quantization}
    _write_json(folder / "config.json", config)


def write_text(manifest: Manifest, folder: Path) -> None:
    """Tokenizer and chat template: copied from a folder, written anew from a GGUF file."""
    if manifest.format != "gguf":
        for name in COPIED:
            if (manifest.source / name).is_file():
                shutil.copyfile(manifest.source / name, folder / name)
        return
    source = read_gguf_text(manifest.source)
    (folder / "tokenizer.json").write_text(_tokenizer_json(source), encoding="utf-8")
    template = {} if source.chat_template is None else {"chat_template": source.chat_template}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(source.add_bos)}
    settings |= {"model_max_length": manifest.max_context, "clean_up_tokenization_spaces": False}
    _write_json(folder / "tokenizer_config.json", settings | source.special_tokens | template)
    defaults = {"bos_token_id": manifest.bos_token_id, "eos_token_id": list(manifest.eos_token_ids)}
    # Without it transformers takes the values for a mistake, and saves no model that has them.
    sampled = {"do_sample": True} if manifest.sampling_defaults else {}
    _write_json(folder / "generation_config.json", defaults | sampled | manifest.sampling_defaults)


def _tokenizer_json(source: TextSource) -> str:
    """Without the piece that stands for bytes outside of the vocabulary: it has no row in the weights."""
    tokenizer = json.loads(source.tokenizer.to_str())
    tokenizer["model"]["vocab"].pop(UNKNOWN_PIECE, None)
    tokenizer["model"]["unk_token"] = None
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != UNKNOWN_PIECE]
    return json.dumps(tokenizer, ensure_ascii=False)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
