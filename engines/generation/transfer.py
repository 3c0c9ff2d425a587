"""Moving small host arrays to the device and results back, without the host ever waiting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_ALIGNMENT = 16
_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32}

HostArray = np.ndarray[tuple[int, ...], np.dtype[np.int32 | np.int64 | np.float32]]


def to_device(arrays: Sequence[HostArray], device: torch.device) -> list[torch.Tensor]:
    """Contiguous arrays as tensors on ``device``: views of the arrays on the CPU, else parts of one packed copy.

    The pinned buffer of a copy comes from torch's host allocator, which reuses it only after the copy is done.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT)
    packed = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    buffer = packed.numpy()
    for array, start in zip(arrays, starts, strict=False):
        buffer[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    moved = packed.to(device, non_blocking=True)
    return [
        moved[start : start + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself on the CPU, else a pinned copy that is valid once the stream has reached this point."""
    if tensor.device.type == "cpu":
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
