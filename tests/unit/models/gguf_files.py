"""Small GGUF files with weights in every type that we read, and the values that these bytes stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

BLOCK_BYTES = {Type.Q4_K: 144, Type.Q5_K: 176, Type.Q6_K: 210}
HIDDEN = 256
"""A multiple of the K-quants' block."""

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 64}


def quantize(values: NDArray[np.float32], kind: Type, draw: np.random.Generator) -> NDArray[Any]:
    """Bytes of that type: the package's quantizer, or for K-quants, which it only reads, random blocks."""
    if kind in BLOCK_BYTES:
        rows, width = values.shape
        blocks = draw.integers(0, 256, (rows, width // 256, BLOCK_BYTES[kind]), dtype=np.uint8)
        scales = (draw.random((rows, width // 256, 2)) * 2e-4).astype(np.float16).view(np.uint8)
        if kind is Type.Q6_K:
            blocks[..., -2:] = scales[..., :2]
        else:
            blocks[..., :4] = scales
        return blocks.reshape(rows, -1)
    return np.asarray(gguf.quants.quantize(values, kind))


def pair_rows(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """What a converter for Llama does to query and key rows: dimensions that rotate together become neighbours."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], kind: Type, **metadata: Any
) -> dict[str, torch.Tensor]:
    """Write the tensors (Hugging Face names) with matrices as ``kind``; returns the values that the file then holds.

    ``metadata`` keys have double underscores for dots and come under the architecture's prefix.
    """
    arch = config["model_type"]
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    for key, value in metadata.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{arch}.{key.replace('__', '.')}", value)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config["num_hidden_layers"])
    stored = {}
    for name, tensor in tensors.items():
        values = tensor.numpy()
        own = kind if values.ndim == 2 else Type.F32
        data = quantize(values, own, draw)
        stored[name] = torch.from_numpy(np.array(gguf.quants.dequantize(data, own), dtype=np.float32))
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        part = name.split(".")[-2]
        if arch == "llama" and part in heads:
            data = pair_rows(data, heads[part])
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored
