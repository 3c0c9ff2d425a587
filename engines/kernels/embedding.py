"""Rows of an embedding: one signature, the fastest implementation that fits."""

from __future__ import annotations

import torch
from torch.nn import functional

from engines.kernels import backends


def embed(token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(T,) int64 ids and a (V, D) table -> (T, D)."""
    if not table.is_cpu and token_ids.shape[0] and table.is_contiguous() and token_ids.is_contiguous():
        triton = backends.triton_for(table)
        if triton is not None:
            return triton.embed(token_ids, table)
    return functional.embedding(token_ids, table)
