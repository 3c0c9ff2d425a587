"""Reads tensors of a ``.gguf`` file under their Hugging Face names, dequantized to float32."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from engines.gguf_config import ROPE_DIVISORS
from engines.gguf_header import GgufTensor, read_gguf_header
from engines.protocol import EngineLoadError

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


class GgufReader:
    """A ``TensorReader``. A name that no known model has stays as it is, for the loader to complain about."""

    def __init__(self, path: Path, head_dim: int) -> None:
        """Raises EngineLoadError if the file is damaged."""
        header = read_gguf_header(path)
        self._data = np.memmap(path, mode="r")
        self._head_dim = head_dim
        # A converter for Llama stores query and key rows so that pairs of rotated dimensions are neighbours.
        self._paired_rows = header.metadata["general.architecture"] == "llama"
        self._tensors: dict[str, GgufTensor] = {}
        for name, tensor in header.tensors.items():
            if name != ROPE_DIVISORS:  # part of the manifest's config
                self._tensors[_checkpoint_name(name)] = tensor
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        tensor = self._tensors[name]
        raw = self._data[tensor.offset : tensor.offset + tensor.nbytes].reshape(*tensor.shape[:-1], -1)
        values = dequantize(raw, GGMLQuantizationType[tensor.type]).reshape(tensor.shape)
        # The copy takes the values out of the mapped, read-only file, where dequantizing left them there.
        whole = torch.from_numpy(np.array(values, dtype=np.float32, copy=tensor.type == "F32"))
        if self._paired_rows and re.search(r"self_attn\.[qk]_proj\.", name):
            whole = _split_pairs(whole, self._head_dim)
        return whole[part]


def _checkpoint_name(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        return name
    layer, stem, kind = match.groups()
    return f"{'' if layer is None else f'model.layers.{layer}.'}{_NAMES[stem]}.{kind}"


def _split_pairs(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(heads * head_dim, ...) with rotated pairs as neighbours -> all first halves of a head, then all second ones."""
    if rows.shape[0] % head_dim:
        raise EngineLoadError(f"query or key rows ({rows.shape[0]}) are no whole number of heads of width {head_dim}")
    return rows.view(-1, head_dim // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
