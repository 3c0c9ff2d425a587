"""Quantized experts of one layer on a GPU: those of one format lie under each other in one weight, a stack.

Experts of a layer may have different formats; each stack says where it has which expert, and a product runs once for
each stack. What cannot be stacked is dequantized when it is packed: the same values in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engines.kernels import backends
from engines.kernels.cuda.quantized_layout import DeviceCodes, dense_codes, device_codes
from engines.kernels.matrices import IntegerMatrix, Matrix, dense, matrix_format, stack_rows


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """Experts of one format."""

    codes: DeviceCodes
    """The lines of its first expert, then those of the next."""
    places: torch.Tensor
    """(experts of the layer,) int32: the place of each among them; -1: it is in another stack."""
    order: torch.Tensor | None
    """(places, depth) int64: as in ``IntegerMatrix``."""


@dataclass(frozen=True, slots=True)
class QuantizedStacks:
    """The routed experts of a layer."""

    gate_up: tuple[ExpertStack, ...]
    """Each expert's gate and up, 2 I lines of the stream's width."""
    down: tuple[ExpertStack, ...]
    experts: int
    chosen: int
    width: int
    inner: int
    """I."""

    def tiles(self, tokens: int, pairs: int) -> int:
        """At most so many tiles of ``pairs`` pairs one step of ``tokens`` tokens has, over all experts."""
        all_pairs = tokens * self.chosen
        active = min(self.experts, all_pairs)
        return active + (all_pairs - active) // pairs


def pack_stacks(
    gate_up: Sequence[Sequence[Matrix]], down: Sequence[Matrix], experts_per_token: int
) -> QuantizedStacks | None:
    """(I, width) gate and up and (width, I) down of each expert; None where Triton's kernels cannot be used."""
    if backends.shared_triton() is None:
        return None
    plain = [matrix for matrix in down if isinstance(matrix, torch.Tensor)]
    dtype = torch.float16 if plain and plain[0].dtype is torch.float16 else torch.bfloat16
    wide = [_joined(parts, dtype) for parts in gate_up]
    width, inner = _shape(down[0])
    return QuantizedStacks(
        _stacked(wide, dtype), _stacked(list(down), dtype), len(down), experts_per_token, width, inner
    )


def _joined(parts: Sequence[Matrix], dtype: torch.dtype) -> Matrix:
    stacked = stack_rows(list(parts))
    if stacked is None:
        stacked = _joined_in_order(parts)
    return torch.cat([dense(part, dtype) for part in parts]) if stacked is None else stacked


def _joined_in_order(parts: Sequence[Matrix]) -> Matrix | None:
    """Of parts whose columns have one order, which comes of the input that they share; None for others."""
    orders = [part.order for part in parts if isinstance(part, IntegerMatrix) and part.order is not None]
    if len(orders) < len(parts) or not all(order.is_meta or torch.equal(order, orders[0]) for order in orders):
        return None
    stacked = stack_rows([_in_turn(part) for part in parts])
    return replace(stacked, order=orders[0]) if isinstance(stacked, IntegerMatrix) else None


def _shape(matrix: Matrix) -> tuple[int, int]:
    lines, depth = matrix.shape
    return lines, depth


def _stacked(experts: list[Matrix], dtype: torch.dtype) -> tuple[ExpertStack, ...]:
    by_format: dict[object, list[int]] = {}
    for number, matrix in enumerate(experts):
        by_format.setdefault(_stackable_format(matrix), []).append(number)
    stacks = []
    for key, numbers in by_format.items():
        own = [experts[number] for number in numbers]
        stacks.append(_stack(own if key else [dense(matrix, dtype) for matrix in own], numbers, len(experts), dtype))
    return tuple(stacks)


def _stackable_format(matrix: Matrix) -> object:
    """Equal for experts of one stack; None for those that have to be dequantized."""
    if isinstance(matrix, torch.Tensor):
        return None
    ordered = isinstance(matrix, IntegerMatrix) and matrix.order is not None
    key = matrix_format(_in_turn(matrix))
    return None if key is None else (ordered, key)


def _in_turn(matrix: Matrix) -> Matrix:
    """As if its columns were in their own order."""
    return replace(matrix, order=None) if isinstance(matrix, IntegerMatrix) else matrix


def _stack(own: list[Matrix], numbers: list[int], experts: int, dtype: torch.dtype) -> ExpertStack:
    whole = stack_rows([_in_turn(matrix) for matrix in own])
    assert whole is not None
    codes = None if isinstance(whole, torch.Tensor) else device_codes(whole)
    orders = [matrix.order for matrix in own if isinstance(matrix, IntegerMatrix) and matrix.order is not None]
    if codes is None:
        codes, orders = dense_codes(torch.cat([dense(matrix, dtype) for matrix in own])), []
    places = torch.full((experts,), -1, dtype=torch.int32)
    places[numbers] = torch.arange(len(numbers), dtype=torch.int32)
    return ExpertStack(codes, places.to(codes.codes.device), torch.stack(orders) if orders else None)
