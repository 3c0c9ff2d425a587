"""Which gated linear layers of many rows run in one kernel."""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from engines.kernels.cuda.device import runs_gluon

FEWEST_WAVES: float = 2.5
"""Tiles for each processor from which on ``hopper_gated`` takes less time than a product and a kernel that gates."""


@functools.cache
def _hopper_kernel(device: torch.device) -> ModuleType | None:
    """The kernel's file, where this device and this Triton run it."""
    if not runs_gluon(device):
        return None
    from engines.kernels.cuda import hopper_gated

    return hopper_gated


def gated_linear(x: torch.Tensor, weight: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor | None:
    """(T, K) and contiguous (2 I, K), the gate's rows first -> (T, I): ``silu(gate) * up``, in ``into`` if that is
    given; None where other kernels are faster or this one does not fit. All are of one 16-bit type."""
    rows, width = x.shape[0], weight.shape[0] // 2
    kernel = _hopper_kernel(x.device)
    if kernel is None or kernel.waves(rows, width, x.device) < FEWEST_WAVES or not kernel.fits(x, weight):
        return None
    output = x.new_empty(rows, width) if into is None else into
    kernel.gated_linear(x, weight, output)
    return output
