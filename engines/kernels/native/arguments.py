"""What the native library's larger functions are told: structures filled with tensors' addresses, shapes and types."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.kernels.native.library import SCALE_CODES, TYPE_CODES, AttentionCall, QuantizedCall
from engines.kernels.reference import AttentionBatch


@dataclass(frozen=True, slots=True)
class PackedCodes:
    """A weight's codes as quantized.h wants them."""

    codes: torch.Tensor
    """uint8 (panels, depth / 4, panel width, 4), or (panels, depth / 8, panel width, 4) where ``halves``."""
    scale: torch.Tensor
    """(panels, groups, panel width) float32, bfloat16 or float16; so ``offset``, of the same type."""
    offset: torch.Tensor | None
    width: int
    """Input features."""
    depth: int
    """Those, filled up."""
    columns: int
    """Output features."""
    group: int
    """Features that share a weight's scale."""
    block: int
    """Features, a part of a group, whose products are summed as integers."""
    zero_point: int
    halves: bool
    """Two codes a byte: that of feature 8 i + j in the lower half, that of 8 i + 4 + j in the upper one."""
    per_token: bool
    """One scale for all activations of a token, not one for each block."""
    input_scale: float
    """Of all activations; 0: taken from them."""


def quantized_call(
    x: torch.Tensor,
    weight: PackedCodes,
    norm: tuple[torch.Tensor, float] | None,
    bias: torch.Tensor | None,
    gated: bool,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    threads: int,
) -> QuantizedCall:
    """As ``Native.quantized_linear``, into ``out``; without a workspace."""
    norm_weight, eps = (None, 0.0) if norm is None else (norm[0].data_ptr(), norm[1])
    residual_at, residual_stride = (None, 0) if residual is None else (residual.data_ptr(), residual.stride(0))
    return QuantizedCall(
        x.data_ptr(),
        x.stride(0),
        norm_weight,
        weight.codes.data_ptr(),
        weight.scale.data_ptr(),
        None if weight.offset is None else weight.offset.data_ptr(),
        None if bias is None else bias.data_ptr(),
        residual_at,
        residual_stride,
        out.data_ptr(),
        None,
        0,
        x.shape[0],
        weight.width,
        weight.depth,
        weight.columns,
        weight.group,
        weight.block,
        eps,
        weight.input_scale,
        weight.zero_point,
        weight.halves,
        weight.per_token,
        gated,
        TYPE_CODES[x.dtype],
        SCALE_CODES[weight.scale.dtype],
        TYPE_CODES[out.dtype],
        threads,
    )


def attention_call(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: AttentionBatch,
    block_tables: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    workspace: int,
    threads: int,
) -> AttentionCall:
    """As ``Native.attention``, into ``out``, with the address of a workspace."""
    _, query_heads, head_dim = queries.shape
    _, key_token_stride, key_head_stride, _ = keys.stride()
    _, value_token_stride, value_head_stride, _ = values.stride()
    query_token_stride, query_head_stride, _ = queries.stride()
    return AttentionCall(
        queries.data_ptr(),
        query_token_stride,
        query_head_stride,
        keys.data_ptr(),
        values.data_ptr(),
        key_token_stride,
        key_head_stride,
        value_token_stride,
        value_head_stride,
        out.data_ptr(),
        batch.positions.data_ptr(),
        batch.query_starts.data_ptr(),
        block_tables.data_ptr(),
        block_tables.stride(0),
        keys.shape[1],
        batch.context_lengths.shape[0],
        query_heads,
        keys.shape[2],
        head_dim,
        values.shape[3],
        workspace,
        scale,
        batch.decode_rows == batch.context_lengths.shape[0] == queries.shape[0],
        TYPE_CODES[queries.dtype],
        TYPE_CODES[keys.dtype],
        threads,
    )
