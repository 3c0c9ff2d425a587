from __future__ import annotations

import numpy as np
import torch

from engines.generation.transfer import to_device, to_host


def test_host_arrays_are_not_copied_on_the_cpu() -> None:
    array = np.arange(4, dtype=np.int64)
    (tensor,) = to_device((array,), torch.device("cpu"))
    array[0] = 9
    assert tensor.tolist() == [9, 1, 2, 3]
    assert to_host(tensor) is tensor
