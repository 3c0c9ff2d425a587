"""What kernels have to know of a device."""

from __future__ import annotations

import functools

import torch

from engines.kernels.cuda.tuning import Machine, machine_of

HOPPER = (9, 0)
GLUON_TRITON = "3.6."
"""Versions in which the kernels for Hopper were measured: what they are written in changes from one to the next."""

_rehearsed: Machine | None = None


def rehearse_on(machine: Machine) -> None:
    """From now on, in this process, tensors on the meta device stand for ones on that GPU.

    So a process without a GPU walks through a model's steps and finds what they launch. Call it before any kernel.
    """
    global _rehearsed
    _rehearsed = machine


def rehearsed() -> bool:
    """Whether this process has called ``rehearse_on``."""
    return _rehearsed is not None


def machine_at(device: torch.device) -> Machine | None:
    """The GPU that the device is or stands for; None for the CPU, where kernels are interpreted."""
    if device.type == "cuda":
        return machine_of(device.index)
    return _rehearsed if device.type == "meta" else None


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors; 1 where kernels are interpreted."""
    machine = machine_at(device)
    return 1 if machine is None else machine.multiprocessors


@functools.cache
def starts_early(device: torch.device) -> bool:
    """Whether a kernel can start while the one before it runs (programmatic dependent launch)."""
    machine = machine_at(device)
    return machine is not None and machine.capability >= (9, 0)


@functools.cache
def runs_gluon(device: torch.device) -> bool:
    """Whether this device and this Triton run the kernels for Hopper."""
    import triton

    machine = machine_at(device)
    return machine is not None and machine.capability == HOPPER and triton.__version__.startswith(GLUON_TRITON)
