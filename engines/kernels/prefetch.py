"""Reading weights into a GPU's cache before the layer that needs them, while the memory would be idle."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engines.kernels import backends
from engines.kernels.cuda import shared_triton


def prefetch(weights: Sequence[torch.Tensor]) -> None:
    """Begin to read these weights into the cache, as far as there is room, beside what is launched next.

    Only where a step on a GPU is being captured; the step must end with ``join_prefetches``.
    """
    if weights and (triton := backends.triton_for(weights[0])) is not None:
        triton.branch(weights[0].device).prefetch(weights)


def join_prefetches(device: torch.device) -> None:
    """End what ``prefetch`` began: what is launched next comes after it."""
    if device.type == "cuda" and (triton := shared_triton()) is not None:
        triton.branch(device).join()
