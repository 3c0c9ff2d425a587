"""A GGUF file's metadata under the key names of ``config.json``."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any

from engines.fields import Fields
from engines.gguf_header import GgufHeader, GgufTensor
from engines.protocol import EngineLoadError
from engines.quantization import GgufBlocks, LayerRule, Quantization

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_DIVISORS = "rope_freqs.weight"
"""The tensor by which a converter hands over llama3's rope scaling: one divisor for each frequency."""

PLAIN_TYPES = ("F32", "F16", "BF16")
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf_config(path: Path, header: GgufHeader) -> dict[str, Any]:
    """Config of the ``llama``, ``qwen2`` and ``qwen3`` architectures.

    Raises EngineLoadError for another architecture, a part of a split file, or a variant that is not supported.
    """
    name = path.name
    metadata = Fields(header.metadata, name)
    kind = metadata.text("general.architecture")
    if kind not in ARCHITECTURES:
        raise EngineLoadError(
            f"{name}: the architecture {kind[:80]!r} is not supported in a .gguf file; {', '.join(ARCHITECTURES)} are"
        )
    if metadata.values.get("split.count", 1) not in (0, 1):
        raise EngineLoadError(f"{name} is one part of a split file; join the parts first (llama-gguf-split --merge)")
    if metadata.values.get(f"{kind}.expert_count", 0) != 0:
        raise EngineLoadError(f"{name}: {kind} models with experts are not supported")
    hidden = metadata.count(f"{kind}.embedding_length")
    heads = metadata.count(f"{kind}.attention.head_count")
    head_dim = metadata.count(f"{kind}.attention.key_length", hidden // heads)
    for key in (f"{kind}.attention.value_length", f"{kind}.rope.dimension_count"):
        if metadata.count(key, head_dim) != head_dim:
            raise metadata.fail(key, f"{head_dim}, the width of a head")
    return {
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata.count(f"{kind}.feed_forward_length"),
        "num_hidden_layers": metadata.count(f"{kind}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count(f"{kind}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": metadata.number(f"{kind}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.count(f"{kind}.context_length"),
        "rope_theta": metadata.number(f"{kind}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(path, header, metadata, kind),
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "vocab_size": _vocab_size(header, name),
        "bos_token_id": metadata.values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(metadata),
    }


def _vocab_size(header: GgufHeader, name: str) -> int:
    """Rows of the embedding: the metadata may leave the number out, or count without padding."""
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise EngineLoadError(f"{name}: tensor token_embd.weight is missing")
    return embedding.shape[0]


def _end_tokens(metadata: Fields) -> list[int]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [token for key in keys for token in metadata.token_ids(f"tokenizer.ggml.{key}")]
    return list(dict.fromkeys(ids))


def _rope_scaling(path: Path, header: GgufHeader, metadata: Fields, kind: str) -> dict[str, Any] | None:
    if ROPE_DIVISORS in header.tensors:
        return {"rope_type": "divisors", "divisors": _read_divisors(path, header.tensors[ROPE_DIVISORS])}
    method = metadata.text(f"{kind}.rope.scaling.type", "none")
    if method == "none":
        return None
    if method not in ("linear", "yarn") or metadata.number(f"{kind}.rope.scaling.attn_factor", 1.0) != 1.0:
        raise EngineLoadError(f"{path.name}: rope scaling {method[:40]!r} is not supported in this form")
    factor = metadata.number(f"{kind}.rope.scaling.factor", 1.0)
    if method == "linear":
        return {"rope_type": "linear", "factor": factor}
    trained = metadata.optional_count(f"{kind}.rope.scaling.original_context_length")
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}


def _read_divisors(path: Path, tensor: GgufTensor) -> list[float]:
    if tensor.type != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > 4096:
        raise EngineLoadError(f"{path.name}: tensor {ROPE_DIVISORS} must be a short F32 vector")
    with path.open("rb") as file:
        file.seek(tensor.offset)
        values = struct.unpack(f"<{tensor.shape[0]}f", file.read(tensor.nbytes))
    if not all(0 < value < math.inf for value in values):
        raise EngineLoadError(f"{path.name}: tensor {ROPE_DIVISORS} must hold numbers above 0")
    return list(values)


def checkpoint_name(name: str) -> str:
    """A tensor's name in a Hugging Face checkpoint; a name that no known model has stays as it is."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        return name
    layer, stem, kind = match.groups()
    return f"{'' if layer is None else f'model.layers.{layer}.'}{_NAMES[stem]}.{kind}"


def read_gguf_quantization(header: GgufHeader) -> Quantization | None:
    """Which matrices are stored in blocks, and of which type."""
    layers: dict[str, list[str]] = {}
    for file_name, tensor in header.tensors.items():
        layer, _, kind = checkpoint_name(file_name).rpartition(".")
        if tensor.type not in PLAIN_TYPES and len(tensor.shape) == 2 and kind == "weight":
            layers.setdefault(tensor.type, []).append(layer)
    rules = [LayerRule(targets=tuple(names), format=GgufBlocks(blocks=kind)) for kind, names in layers.items()]
    return Quantization(method="gguf", rules=tuple(rules)) if rules else None
