from __future__ import annotations

import numpy as np
import torch

from engines.generation.transfer import HostArray, pack, packed_bytes, to_device, to_host, unpack


def test_host_arrays_are_not_copied_on_the_cpu() -> None:
    array = np.arange(4, dtype=np.int64)
    (tensor,) = to_device((array,), torch.device("cpu"))
    array[0] = 9
    assert tensor.tolist() == [9, 1, 2, 3]
    assert to_host(tensor) is tensor


def test_a_packed_copy_gives_the_arrays_back() -> None:
    arrays: list[HostArray] = [
        np.arange(5, dtype=np.int64) - (1 << 62),
        np.array([0.5, -2.25, 1e-30], np.float32),
        np.zeros(0, np.int64),
        np.arange(6, dtype=np.int32).reshape(2, 3),
        np.array([7], np.int64),
    ]
    packed = torch.empty(packed_bytes(arrays), dtype=torch.uint8)
    pack(arrays, packed)
    for array, view in zip(arrays, unpack(arrays, packed), strict=True):
        assert view.numpy().dtype == array.dtype
        assert np.array_equal(view.numpy(), array)
