"""Launches products with quantized weights: the kernel of few rows, and what serves many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engines.kernels.cuda.device import machine_at
from engines.kernels.cuda.launch import Launcher
from engines.kernels.cuda.quantized_kernel import quantized_kernel
from engines.kernels.cuda.quantized_layout import DeviceCodes
from engines.kernels.cuda.quantized_rows import dequantize_lines
from engines.kernels.cuda.quantized_tuning import QuantizedConfig, QuantizedShape, config_for, tile_rows
from engines.kernels.cuda.skinny import split_scratch
from engines.kernels.cuda.tuning import MOST_SQUARES, WEIGHT_ALIGNMENT, ceil_div, next_power_of_two

if TYPE_CHECKING:
    from engines.kernels.linear import Handover

DEQUANTIZED_BYTES = 32 << 20
"""Of a weight at once, for cuBLAS: what has just been written is then still in the L2 cache."""

_launch = Launcher(quantized_kernel)


def quantized_config(codes: DeviceCodes, rows: int, gated: bool, device: torch.device) -> QuantizedConfig | None:
    """How ``rows`` rows run here; None where ``dequantized_product`` is faster, or the kernel does not fit."""
    machine = machine_at(device)
    return None if machine is None else config_for(QuantizedShape.of(codes, gated), rows, machine)


def quantized_linear(
    x: torch.Tensor,
    codes: DeviceCodes,
    config: QuantizedConfig,
    row_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    into: torch.Tensor | None = None,
    handed: Handover | None = None,
    handover: Handover | None = None,
) -> torch.Tensor:
    """(T, in) bfloat16 -> (T, out), or (T, out / 2) where gated; ``codes.order`` has already been heeded.

    ``row_scale``: x holds codes, what each row's stand for. ``dtype`` is the result's; ``into`` memory for it.
    ``handed``: x is its ``scaled``; ``handover`` is filled for the layer that reads the result, with ``handed_tiles``
    parts.
    """
    rows, lines = x.shape[0], codes.lines
    padded, block_k = codes.padded_depth, config.block_k(codes.unit)
    output = x.new_empty(rows, lines // 2 if gated else lines, dtype=dtype) if into is None else into
    parts = 0 if handed is None else handed.squares.shape[1]
    even = codes.depth == padded and padded % block_k == 0
    _launch(
        (ceil_div(rows, tile_rows(rows)), ceil_div(lines, config.block_n), config.splits),
        (
            *_read(x, codes, row_scale, bias, residual),
            output,
            *split_scratch(x.device),
            codes.factor if handed is None else handed.squares,
            *((x, x, x) if handover is None else (handover.norm.weight, handover.scaled, handover.squares)),
        ),
        fixed=(
            lines,
            codes.depth,
            padded,
            codes.books,
            codes.book_size,
            x.stride(0),
            0 if residual is None else residual.stride(0),
        ),
        free=(rows, 0.0 if handed is None else handed.norm.eps),
        constants=(
            tile_rows(rows),
            *_tiling(codes, config),
            codes.format,
            codes.group,
            codes.offset_kind,
            row_scale is not None,
            bias is not None,
            gated,
            residual is not None,
            even,
            not x.is_cpu,
            parts,
            next_power_of_two(parts),
            handover is not None,
        ),
        warps=config.warps,
        stages=config.stages,
        early=config.early,
    )
    return output


def _read(
    x: torch.Tensor,
    codes: DeviceCodes,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """What the kernel reads; another tensor in the place of one that there is not, and that its constants leave out."""
    empty = codes.factor
    return (
        x,
        codes.codes,
        codes.factor,
        empty if codes.scale is None else codes.scale,
        empty if codes.offset is None else codes.offset,
        empty if codes.levels is None else codes.levels,
        empty if row_scale is None else row_scale,
        x if bias is None else bias,
        x if residual is None else residual,
    )


def _tiling(codes: DeviceCodes, config: QuantizedConfig) -> tuple[int | bool, ...]:
    """The kernel's constants from BLOCK_N on that say how work is cut."""
    return (
        config.block_n,
        codes.unit,
        config.parts,
        config.splits,
        config.stages,
        _prefetch(codes, config),
        config.warps,
        config.early,
    )


def _prefetch(codes: DeviceCodes, config: QuantizedConfig) -> int:
    """Bytes of each line that even the last of the programs that share it has."""
    blocks = ceil_div(codes.padded_depth, config.block_k(codes.unit))
    shortest = codes.padded_depth - (config.splits - 1) * ceil_div(blocks, config.splits) * config.block_k(codes.unit)
    shortest_bytes = shortest * codes.codes.shape[1] // codes.padded_depth
    return min(config.prefetch, max(shortest_bytes, 0)) // WEIGHT_ALIGNMENT * WEIGHT_ALIGNMENT


def handed_tiles(rows: int, lines: int, config: QuantizedConfig) -> int:
    """Sums of squares of each row that a layer hands over; 0 where the layer that reads them could not hold them."""
    tiles = ceil_div(lines, config.block_n)
    holds = rows <= tile_rows(rows) and tile_rows(rows) * next_power_of_two(tiles) <= MOST_SQUARES
    return tiles if holds else 0


def dequantized_product(x: torch.Tensor, codes: DeviceCodes, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(T, in) -> (T, out) in ``dtype``, x's if None: the weight's values in x's type, some lines at a time."""
    output = x.new_empty(x.shape[0], codes.lines, dtype=dtype)
    taken = max(DEQUANTIZED_BYTES // (x.itemsize * codes.depth) // 128 * 128, 128)
    values = x.new_empty(min(taken, codes.lines), codes.depth)
    for first in range(0, codes.lines, taken):
        lines = values[: codes.lines - first]
        dequantize_lines(codes, first, lines)
        part = output[:, first : first + lines.shape[0]]
        if output.dtype is x.dtype:
            torch.mm(x, lines.t(), out=part)
        else:
            part.copy_(torch.mm(x, lines.t(), out_dtype=output.dtype) if x.is_cuda else x @ lines.t())
    return output
