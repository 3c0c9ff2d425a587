"""The native library in each instruction set that this machine has, and memory that shows what was not written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engines.kernels.native import Native
from engines.kernels.native.library import VARIANTS, NativeUnavailable


@pytest.fixture(params=VARIANTS)
def native(request: pytest.FixtureRequest) -> Native:
    try:
        return Native((request.param,))
    except NativeUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, so that an output element that nobody wrote is seen."""
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    torch.manual_seed(7)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
    torch.set_num_threads(threads)
