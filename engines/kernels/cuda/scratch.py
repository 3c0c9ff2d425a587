"""Integers on the device that kernels leave as they found them: zero."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

MOST_COUNTS, MOST_ARRIVALS = 4096, 4096


@dataclass(frozen=True, slots=True)
class Counters:
    """Shared by all layers of a device: one stream runs their kernels one after the other."""

    counts: torch.Tensor
    """(MOST_COUNTS,) int32: tokens of each expert. The last kernel that reads them sets them back."""
    arrivals: torch.Tensor
    """(MOST_ARRIVALS,) int32: programs that have added their part to a tile. The last to arrive sets it back."""
    drawn: torch.Tensor
    """(1,) int32: tiles that the programs of one kernel have drawn. Who draws the last sets it back."""


@functools.cache
def counters(device: torch.device) -> Counters:
    """This device's, made outside any graph's memory at the first call."""
    zeros = torch.zeros(MOST_COUNTS + MOST_ARRIVALS + 1, dtype=torch.int32, device=device)
    return Counters(zeros[:MOST_COUNTS], zeros[MOST_COUNTS:-1], zeros[-1:])
