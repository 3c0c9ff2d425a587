"""Columns that were quantized in the order of their activations: a tensor gives each column's group."""

from __future__ import annotations

import dataclasses

import torch

from engines.kernels import IntegerMatrix
from engines.protocol import EngineLoadError
from engines.quant.base import LinearPart


def in_group_order(part: LinearPart, matrix: IntegerMatrix, group_of: torch.Tensor) -> IntegerMatrix:
    """The matrix with its columns sorted by group; ``group_of`` is (in,).

    Raises EngineLoadError unless all groups have equally many columns.
    """
    if matrix.codes.is_meta:
        return matrix
    groups, group = matrix.scale.shape[1], matrix.group_size
    order = group_of.argsort(stable=True)
    in_turn = torch.arange(order.shape[0], device=order.device)
    if not torch.equal(group_of[order].long(), in_turn // group):
        raise EngineLoadError(
            f"layer {part.name}: its g_idx does not share out the columns evenly among {groups} groups; "
            "fetch the model again"
        )
    if torch.equal(order, in_turn):
        return matrix
    return dataclasses.replace(matrix, codes=matrix.codes[:, order].contiguous(), order=order)
