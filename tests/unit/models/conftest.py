from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny products are slower on two threads, and much slower beside other work."""
    torch.set_num_threads(1)
