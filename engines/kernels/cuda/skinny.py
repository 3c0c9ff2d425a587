"""Launches the skinny kernel: linear layers of at most 128 rows."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engines.kernels.cuda.device import machine_at
from engines.kernels.cuda.launch import Launcher, Specialisation
from engines.kernels.cuda.skinny_kernel import skinny_kernel
from engines.kernels.cuda.tuning import (
    MOST_SQUARES,
    MOST_TILES,
    PARTIAL_FLOATS,
    WEIGHT_ALIGNMENT,
    Machine,
    SkinnyConfig,
    SkinnyShape,
    Table,
    block_rows,
    ceil_div,
    config_for,
    next_power_of_two,
    prefer_table,
    resident_programs,
    steps_of_split,
)

if TYPE_CHECKING:
    from engines.kernels.linear import Handover

_launch = Launcher(skinny_kernel)


@dataclass(frozen=True, slots=True)
class Fused:
    """What stands around a product, beside what its shape says."""

    bias: bool = False
    residual: bool = False
    handed: int = 0
    """Sums of squares of each row that were handed over with x."""
    hands_over: bool = False


@functools.cache
def split_scratch(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial sums and counters of the programs that share a tile. Kernels of one stream use them one after the other;
    each leaves the counters at zero."""
    return (
        torch.empty(PARTIAL_FLOATS, dtype=torch.float32, device=device),
        torch.zeros(MOST_TILES, dtype=torch.int32, device=device),
    )


def reserve(device: torch.device) -> None:
    """Allocate what kernels on this device share: before any graph is captured, whose memory is its own."""
    split_scratch(device)


def skinny_config(
    rows: int, lines: int, depth: int, gated: bool, norm: bool, device: torch.device
) -> SkinnyConfig | None:
    """How ``rows`` rows run here; None where cuBLAS is faster, or the kernel does not fit."""
    return _config(rows, lines, depth, gated, norm, device)


@functools.cache
def _config(rows: int, lines: int, depth: int, gated: bool, norm: bool, device: torch.device) -> SkinnyConfig | None:
    if depth % 16:
        return None
    machine = machine_at(device)
    return None if machine is None else config_for(SkinnyShape(lines, depth, gated, norm), rows, machine)


def choose_from(table: Table | None) -> None:
    """From now on layers run what this table says; None: that of the GPU at hand. Captured graphs stay as they are."""
    prefer_table(table)
    _config.cache_clear()


@functools.cache
def _constants(
    shape: SkinnyShape, rows: int, config: SkinnyConfig, fused: Fused, machine: Machine | None
) -> tuple[int | bool, ...]:
    """The kernel's compile-time arguments, in order; ``machine`` None where it is interpreted."""
    block_m, depth = block_rows(rows), shape.depth
    shortest = depth - (config.splits - 1) * steps_of_split(config, depth) * config.block_k
    prefetch = min(config.prefetch, 2 * shortest) // WEIGHT_ALIGNMENT * WEIGHT_ALIGNMENT
    further = 0 < prefetch < 2 * shortest and shortest >= config.block_k
    slots = 0
    if machine is not None and prefetch and config.splits == 1:
        slots = resident_programs(config, shape, block_m, machine)
    return (
        block_m,
        config.block_n,
        config.block_k,
        config.parts,
        config.splits,
        config.stages,
        prefetch,
        prefetch // 2 if further else 0,
        slots if slots < ceil_div(shape.lines, config.block_n) else 0,
        config.warps,
        config.early,
        shape.norm,
        fused.bias,
        shape.gated,
        fused.residual,
        depth % config.block_k == 0,
        fused.handed,
        next_power_of_two(fused.handed),
        fused.hands_over,
    )


def handed_tiles(rows: int, lines: int, config: SkinnyConfig) -> int:
    """Sums of squares of each row that a layer hands over; 0 where the layer that reads them could not hold them."""
    tiles = ceil_div(lines, config.block_n)
    return tiles if block_rows(rows) * next_power_of_two(tiles) <= MOST_SQUARES else 0


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    config: SkinnyConfig,
    norm: tuple[torch.Tensor, float] | None = None,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    into: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
    handover: Handover | None = None,
) -> torch.Tensor:
    """(T, in) and contiguous (out, in) of one 16-bit type -> (T, out), or (T, out / 2) where gated.

    ``norm`` is an RMS norm's gain and epsilon; ``dtype`` the result's, x's if None; ``into`` contiguous memory for it.
    ``in`` is a multiple of 16.
    ``squares``, contiguous (T, parts) float32: x has been multiplied by the norm's gain, and these sum to the squares
    of what it was before. ``handover`` is filled for the layer that reads the result; it has ``handed_tiles`` parts.
    """
    rows, depth = x.shape
    lines = weight.shape[0]
    shape = SkinnyShape(lines, depth, gated, norm is not None and squares is None)
    handed = 0 if squares is None else squares.shape[1]
    fused = Fused(bias is not None, residual is not None, handed, handover is not None)
    machine = machine_at(x.device)
    output = x.new_empty(rows, lines // 2 if gated else lines, dtype=dtype) if into is None else into
    gain, eps = (x, 0.0) if norm is None else norm
    _launch(
        (ceil_div(lines, config.block_n), config.splits, 1),
        (
            x,
            weight,
            gain,
            x if bias is None else bias,
            x if residual is None else residual,
            output,
            *split_scratch(x.device),
            x if squares is None else squares,
            *((x, x, x) if handover is None else (handover.norm.weight, handover.scaled, handover.squares)),
        ),
        fixed=(lines, depth, x.stride(0), 0 if residual is None else residual.stride(0)),
        free=(rows, eps),
        constants=_constants(shape, rows, config, fused, machine),
        warps=config.warps,
        stages=config.stages,
        early=config.early,
    )
    return output


def compile_skinny(
    shape: SkinnyShape,
    rows: int,
    config: SkinnyConfig,
    machine: Machine,
    fused: Fused,
    dtype: torch.dtype,
    output_dtype: torch.dtype,
) -> None:
    """Put into the cache on disk what ``skinny_linear`` runs on contiguous tensors; needs no GPU of its own."""
    width = shape.lines // 2 if shape.gated else shape.lines
    sums = torch.float32
    handovers = (sums if fused.handed else dtype, dtype, dtype, sums if fused.hands_over else dtype)
    types = (dtype, dtype, dtype, dtype, dtype, output_dtype, sums, torch.int32, *handovers)
    Specialisation(
        _launch,
        tuple((each, True) for each in types),
        fixed=(shape.lines, shape.depth, shape.depth, width if fused.residual else 0),
        free=(rows, 0.0),
        constants=_constants(shape, rows, config, fused, machine),
        warps=config.warps,
        stages=config.stages,
        early=config.early,
    ).compile()
