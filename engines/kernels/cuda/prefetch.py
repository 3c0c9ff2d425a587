"""Reads weights into the L2 cache beside the kernels that run before the one that needs them.

The small kernels of a layer (attention and the layers around it) leave the memory idle; the next large matrix can
come meanwhile. In a captured step the reads are a branch of the graph that nothing waits for until the step ends.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from engines.kernels.cuda.launch import Launcher

OLDEST_CAPABILITY = (9, 0)
"""Hopper: the first with bulk prefetches."""
L2_SHARE = float(os.environ.get("PF_SHARE", "0.4"))
"""Of the L2 cache, for bytes that are on their way: the weights that are used now go through it too."""
SEGMENT = 4096
"""Bytes of one request."""
LANES = 32


@triton.jit
def _prefetch_kernel(weight, size, SEGMENT: tl.constexpr, LANES: tl.constexpr):
    """Grid (programs,): each lane asks for one segment."""
    segment = tl.program_id(0) * LANES + tl.arange(0, LANES)
    start = tl.minimum(segment.to(tl.int64) * SEGMENT, size - SEGMENT)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,n",
        [weight.to(tl.pointer_type(tl.int8)).to(tl.int64) + start, SEGMENT],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


_prefetch = Launcher(_prefetch_kernel)


class Branch:
    """The branch of the step that is being captured on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        capable = torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
        self._room = int(L2_SHARE * torch.cuda.get_device_properties(device).L2_cache_size) if capable else 0
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._forked = False

    def prefetch(self, weights: Sequence[torch.Tensor]) -> None:
        """Begin to read the weights, as far as there is room for them, once all that was launched before is done.

        Does nothing outside a capture.
        """
        left = self._room
        if not left or not torch.cuda.is_current_stream_capturing():
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._forked = True
        with torch.cuda.stream(self._stream):
            for weight in weights:
                size = min(weight.nbytes, left) // SEGMENT * SEGMENT
                if size:
                    left -= size
                    programs = -(-size // (SEGMENT * LANES))
                    _prefetch((programs, 1, 1), (weight,), fixed=(size,), free=(), constants=(SEGMENT, LANES), warps=1)

    def join(self) -> None:
        """The current stream goes on when all prefetches of the capture have been launched."""
        if self._forked:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._forked = False


@functools.cache
def branch(device: torch.device) -> Branch:
    """Of this device."""
    return Branch(device)
