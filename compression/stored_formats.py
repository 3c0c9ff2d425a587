"""Quantized matrices as tensors of a file, and what ``config.json`` says of them.

Names and layouts are those of compressed-tensors, so that other servers read the files; codebooks, which it does not
have, are our own format.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from compression.quantize.base import Scheme
from engines.kernels import CodebookMatrix, Float8Matrix, QuantizedMatrix

WORD_BITS = 32


def stored_format(scheme: Scheme) -> str:
    """The name that a config group has for the layout of its tensors."""
    if scheme.kind == "codebook":
        return "codebook"
    if scheme.kind == "float8":
        return "float-quantized"
    return "int-quantized" if scheme.activations == "int8" else "pack-quantized"


def stored_tensors(matrix: QuantizedMatrix, scheme: Scheme) -> dict[str, torch.Tensor]:
    """By what is appended to the layer's name."""
    if isinstance(matrix, CodebookMatrix):
        # One set of levels for all rows, and a scale for each group.
        assert matrix.scale is not None
        return {
            "weight_codes": _packed_bits(matrix.codes, matrix.bits),
            "weight_codebook": matrix.codebook[:1].to(torch.float16).contiguous(),
            "weight_scale": matrix.scale.to(scheme.scale_dtype),
            "weight_shape": torch.tensor(matrix.shape),
        }
    scale = matrix.scale.to(scheme.scale_dtype)
    if isinstance(matrix, Float8Matrix):
        tensors = {"weight": matrix.codes, "weight_scale": scale}
    elif stored_format(scheme) == "int-quantized":
        codes = (matrix.codes.to(torch.int16) - 128).to(torch.int8)
        tensors = {"weight": codes, "weight_scale": scale}
    else:
        tensors = {
            "weight_packed": pack_words(matrix.codes, matrix.bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(matrix.shape),
        }
        if matrix.offset is not None:
            zero = (-matrix.offset / matrix.scale).round().to(torch.uint8)
            tensors["weight_zero_point"] = pack_words(zero.t().contiguous(), matrix.bits).t().contiguous()
    if matrix.input_scale is not None:
        tensors["input_scale"] = matrix.input_scale.to(scheme.scale_dtype).view(1)
    return tensors


def stored_bytes(scheme: Scheme, out_features: int, in_features: int) -> int:
    """What ``stored_tensors`` take of such a layer, by arithmetic."""
    rows, groups, item = out_features, scheme.groups(in_features), scheme.scale_dtype.itemsize
    codes = rows * -(-in_features * scheme.bits // 8)
    if scheme.kind == "codebook":
        return codes + rows * groups * item + (1 << scheme.bits) * 2 + 16
    if scheme.block is not None:
        return codes + -(-rows // scheme.block[0]) * -(-in_features // scheme.block[1]) * item
    scales = rows * groups * item + (item if scheme.static_input else 0)
    if stored_format(scheme) != "pack-quantized":
        return codes + scales
    packed = rows * -(-in_features * scheme.bits // WORD_BITS) * 4
    zeros = 0 if scheme.symmetric else groups * -(-rows * scheme.bits // WORD_BITS) * 4
    return packed + scales + zeros + 16


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, columns) codes -> (rows, words) int32: a row's codes one after the other, lowest bits first."""
    packed = _packed_bits(codes, bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    return padded.view(torch.int32)


def _packed_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, columns) codes -> (rows, bytes) uint8: a row's codes one after the other, lowest bits first."""
    values = codes.cpu().numpy()
    single = np.unpackbits(values[..., np.newaxis], axis=2, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(single.reshape(values.shape[0], -1), axis=1, bitorder="little"))


def weight_arguments(scheme: Scheme) -> dict[str, Any]:
    """``weights`` of a config group."""
    if scheme.kind == "codebook":
        return {"num_bits": scheme.bits, "group_size": scheme.group_size, "shared": True}
    strategy = "group" if scheme.group_size else "channel"
    if scheme.block is not None:
        strategy = "block"
    return {
        "num_bits": scheme.bits,
        "type": "float" if scheme.kind == "float8" else "int",
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": scheme.group_size,
        "block_structure": list(scheme.block) if scheme.block else None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def input_arguments(scheme: Scheme) -> dict[str, Any] | None:
    """``input_activations`` of a config group; None where inputs are not rounded."""
    if scheme.activations == "float":
        return None
    return {
        "num_bits": 8,
        "type": "float" if scheme.activations == "float8" else "int",
        "symmetric": True,
        "strategy": "tensor" if scheme.static_input else "token",
        "group_size": None,
        "block_structure": None,
        "dynamic": not scheme.static_input,
        "actorder": None,
        "observer": "minmax" if scheme.static_input else None,
        "observer_kwargs": {},
    }
