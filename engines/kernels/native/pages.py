"""Memory for weights that is mapped in huge pages where the system lends them: read through once a step, weights need
thousands of small pages' addresses looked up each time."""

from __future__ import annotations

import mmap
import threading
import weakref

import torch

CHUNK_BYTES = 32 << 20
"""Of one mapping, which many tensors share; it is given back when the last of them is."""
ALIGNMENT = 64

_lock = threading.Lock()
_open: tuple[weakref.ref[mmap.mmap], int] | None = None
"""The mapping that is being filled, and where its free part starts."""


def in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a contiguous CPU tensor; the tensor itself where the system has no huge pages to ask for."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or tensor.nbytes == 0:
        return tensor
    memory, start = _reserve(tensor.nbytes)
    held = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return held.copy_(tensor)


def _reserve(size: int) -> tuple[mmap.mmap, int]:
    global _open
    with _lock:
        memory, start = (None, 0) if _open is None else (_open[0](), _open[1])
        if memory is None or start + size > len(memory):
            memory, start = mmap.mmap(-1, max(size, CHUNK_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0
            memory.madvise(mmap.MADV_HUGEPAGE)
        _open = weakref.ref(memory), start + -(-size // ALIGNMENT) * ALIGNMENT
        return memory, start
