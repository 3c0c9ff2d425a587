"""The bytes of the KV blocks. Which block holds what is the scheduler's business."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

from engines.models.batch import KvLayout, LayerCache

BLOCK_SIZE = 16
"""Tokens in a block, on every device. A sequence wastes half a block on average and a prefix hit ends at a block's
border, so small is good; 16 tokens of one head are 2 to 8 KiB in a row, enough for whole cache lines, pages and
the tile of a later GPU kernel, and keep a block table of 8192 tokens at 512 entries."""


def allocate(
    layout: KvLayout,
    blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    scales: Sequence[torch.Tensor] = (),
) -> list[LayerCache]:
    """One ``LayerCache`` a layer, filled with zeros: a kernel may multiply what it masks, and 0 * NaN is NaN.

    An fp8 cache gets each layer's ``scales``, ``layout.scale_shape``; all are 1 if none are given.
    """
    caches: list[LayerCache] = []
    for layer in range(layout.layers):
        tensors = [_zeros((blocks, block_size, *shape), dtype, device) for shape in layout.token_shapes]
        if dtype is torch.float8_e4m3fn:
            tensors.append(scales[layer] if scales else torch.ones(layout.scale_shape, device=device))
        caches.append(tuple(tensors))
    return caches


def block_bytes(layout: KvLayout, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return layout.bytes_per_token(dtype.itemsize) * block_size


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the CPU, pages that the system zeroes when they are first written: to touch them now takes 1 s for each GB.

    They are reserved once, all the same, and resident memory never grows beyond them.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
