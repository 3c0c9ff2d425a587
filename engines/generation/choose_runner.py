"""Which runner a device gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from engines.generation.launched import LaunchedStep
from engines.generation.runner import StepRunner
from engines.generation.threads import ThreadGovernor
from engines.kernels.cuda import shared_triton
from engines.models.batch import LayerCache
from engines.models.model import Model
from engines.protocol import Capacity, StepPlan


class Captured(Protocol):
    """Steps that a runner holds as CUDA graphs."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Captured sizes of steps in which every row decodes."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Captured sizes of any other step."""

    def capture_next(self) -> bool:
        """Capture one more between two steps; False when none is left."""


class Runner(Protocol):
    """Computes plans in the order in which they are given. One thread only."""

    @property
    def captured(self) -> Captured | None:
        """None where steps are never captured."""

    def run(self, plan: StepPlan) -> LaunchedStep:
        """Compute the step, or enqueue it on the device."""


def uses_triton(device: torch.device) -> bool:
    """Whether the device's steps run on Triton kernels."""
    return device.type == "cuda" and shared_triton() is not None


def make_runner(
    model: Model,
    caches: list[LayerCache],
    capacity: Capacity,
    device: torch.device,
    clock: Callable[[], float],
    governor: ThreadGovernor | None = None,
    graph_memory: int = 0,
) -> Runner:
    """``graph_memory``: bytes that CUDA graphs may take; 0 captures none."""
    if uses_triton(device):
        from engines.generation.gpu_runner import GpuStepRunner

        return GpuStepRunner(model, caches, capacity, device, clock, graph_memory)
    return StepRunner(model, caches, capacity, device, clock, governor)


def state_bytes(
    model: Model, max_rows: int, max_step_tokens: int, max_model_len: int, block_size: int, device: torch.device
) -> int:
    """Bytes that a runner takes for itself, roughly, beside its graphs."""
    if uses_triton(device):
        from engines.generation.gpu_runner import GpuStepRunner

        return GpuStepRunner.state_bytes(model, max_rows, max_step_tokens, max_model_len, block_size)
    return StepRunner.state_bytes(max_rows, max_model_len, model.vocab_size)
