"""Reads tensors of a ``.gguf`` file under their Hugging Face names: blocks as they are, or dequantized to float32."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from engines.gguf_config import PLAIN_TYPES, ROPE_DIVISORS, checkpoint_name
from engines.gguf_header import GgufTensor, read_gguf_header
from engines.protocol import EngineLoadError


class GgufReader:
    """A ``TensorReader``. A name that no known model has stays as it is, for the loader to complain about."""

    def __init__(self, path: Path, head_dim: int, keep_blocks: bool = False) -> None:
        """``keep_blocks``: quantized matrices come as ``NAME.weight_blocks``, (out, bytes of a row) uint8, instead of
        ``NAME.weight`` in float32. Raises EngineLoadError if the file is damaged."""
        header = read_gguf_header(path)
        self._data = np.memmap(path, mode="r")
        self._head_dim = head_dim
        # A converter for Llama stores query and key rows so that pairs of rotated dimensions are neighbours.
        self._paired_rows = header.metadata["general.architecture"] == "llama"
        self._tensors: dict[str, GgufTensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file_name, tensor in header.tensors.items():
            if file_name == ROPE_DIVISORS:
                continue  # part of the manifest's config
            name, shape = checkpoint_name(file_name), tensor.shape
            if keep_blocks and tensor.type not in PLAIN_TYPES and len(shape) == 2:
                name, shape = f"{name}_blocks", (shape[0], tensor.nbytes // shape[0])
            self._tensors[name], self.shapes[name] = tensor, shape

    def read(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        tensor = self._tensors[name]
        raw = self._data[tensor.offset : tensor.offset + tensor.nbytes].reshape(*tensor.shape[:-1], -1)
        # Copies take the values out of the mapped, read-only file.
        if name.endswith("_blocks"):
            whole = torch.from_numpy(np.array(raw))
        else:
            values = dequantize(raw, GGMLQuantizationType[tensor.type]).reshape(tensor.shape)
            whole = torch.from_numpy(np.array(values, dtype=np.float32, copy=tensor.type == "F32"))
        if self._paired_rows and re.search(r"self_attn\.[qk]_proj\.", name):
            whole = _split_pairs(whole, self._head_dim)
        return whole[part]


def _split_pairs(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(heads * head_dim, ...) with rotated pairs as neighbours -> all first halves of a head, then all second ones."""
    if rows.shape[0] % head_dim:
        raise EngineLoadError(f"query or key rows ({rows.shape[0]}) are no whole number of heads of width {head_dim}")
    return rows.view(-1, head_dim // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
