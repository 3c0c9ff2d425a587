"""Moving small host arrays to the device and results back, without the host ever waiting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_ALIGNMENT = 16
_LARGEST_PINNED, _PINNED_BLOCKS = 1 << 20, 6
"""Bytes; and blocks of each size, a power of two: those of two steps on their way."""
_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32}

HostArray = np.ndarray[tuple[int, ...], np.dtype[np.int32 | np.int64 | np.float32]]


def reserve_pinned() -> None:
    """Let torch's host allocator take what steps usually need at once: the driver stops the device to pin memory."""
    sizes = [1 << power for power in range(_LARGEST_PINNED.bit_length())]
    # All at once, or each would be the one before.
    [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes for _ in range(_PINNED_BLOCKS)]


def to_device(arrays: Sequence[HostArray], device: torch.device) -> list[torch.Tensor]:
    """Contiguous arrays as tensors on ``device``: views of the arrays on the CPU, else parts of one packed copy.

    The pinned buffer of a copy comes from torch's host allocator, which reuses it only after the copy is done.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    packed = torch.empty(packed_bytes(arrays), dtype=torch.uint8, pin_memory=True)
    pack(arrays, packed)
    return unpack(arrays, packed.to(device, non_blocking=True))


def packed_bytes(arrays: Sequence[HostArray]) -> int:
    """Size of all arrays one after the other, each on an aligned start."""
    return sum(_aligned(array) for array in arrays)


def pack(arrays: Sequence[HostArray], packed: torch.Tensor) -> None:
    """Write the arrays into a uint8 tensor on the host."""
    buffer, start = packed.numpy(), 0
    for array in arrays:
        buffer[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        start += _aligned(array)


def unpack(arrays: Sequence[HostArray], packed: torch.Tensor) -> list[torch.Tensor]:
    """Views of a packed tensor, wherever it is, with the arrays' types and shapes."""
    views, start = [], 0
    for array in arrays:
        views.append(packed[start : start + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape))
        start += _aligned(array)
    return views


def _aligned(array: HostArray) -> int:
    return -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself on the CPU, else a pinned copy that is valid once the stream has reached this point."""
    if tensor.device.type == "cpu":
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
