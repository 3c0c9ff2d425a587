"""Rows of an embedding: one signature, the fastest implementation that fits."""

from __future__ import annotations

import torch
from torch.nn import functional

from engines.kernels import backends
from engines.kernels.matrices import IntegerMatrix, QuantizedMatrix, dense, take_rows
from engines.kernels.native.library import TYPE_CODES


def embed(token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(T,) int64 ids and a (V, D) table -> (T, D)."""
    if not table.is_cpu and token_ids.shape[0] and table.is_contiguous() and token_ids.is_contiguous():
        triton = backends.triton_for(table)
        if triton is not None:
            return triton.embed(token_ids, table)
    return functional.embedding(token_ids, table)


def embed_quantized(token_ids: torch.Tensor, table: QuantizedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """(T,) int64 ids and a quantized (V, D) table -> (T, D) in ``dtype``.

    Ids are 0 to V - 1. For any other, the native library gives zeros and torch raises IndexError.
    """
    native = backends.native
    if native is not None and isinstance(table, IntegerMatrix) and _fits_native(token_ids, table, dtype):
        return native.embed(token_ids.contiguous(), table.codes, table.scale, 1 << table.bits - 1, dtype)
    return dense(take_rows(table, token_ids), dtype)


def _fits_native(token_ids: torch.Tensor, table: IntegerMatrix, dtype: torch.dtype) -> bool:
    if table.offset is not None or table.order is not None or not table.codes.is_cpu:
        return False
    if token_ids.dtype is not torch.int64 or table.scale.dtype is not torch.float32 or dtype not in TYPE_CODES:
        return False
    return table.codes.is_contiguous() and table.scale.is_contiguous()
