"""Launching Triton kernels at a fraction of the host time that Triton's own launcher takes.

Triton inspects every argument at every launch to find which specialisation to run. Here a kernel's arguments come
sorted by what they mean for that, so that one dictionary look-up finds the compiled kernel.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from triton.runtime import driver

ALIGNMENT = 16
"""Bytes. Triton compiles wider loads for pointers that are multiples of this."""

logger = logging.getLogger(__name__)


class Launcher:
    """Launches one kernel whose parameters are, in this order: tensors, ``fixed``, ``free``, ``constants``.

    Tensors on the CPU go through Triton's interpreter, which must have been on (``TRITON_INTERPRET=1``) when the
    kernel was defined.
    """

    _direct = True
    """Whether this Triton's compiled kernels are called as its own launcher calls them, which no document promises."""

    first_launches = 0
    """Of all kernels in all their forms so far: each compiles, or reads what was compiled, and takes up to seconds."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor, ...],
        fixed: tuple[int, ...],
        free: tuple[int | float, ...],
        constants: tuple[int | bool, ...],
        warps: int = 4,
        stages: int = 3,
        early: bool = False,
    ) -> None:
        """``fixed`` integers (widths, strides), ``constants`` and what follows them get a compiled kernel for each
        combination.

        ``free`` are floats, and integers that the kernel names in ``do_not_specialize``. With ``early`` the kernel may
        start while the one before it in the stream still runs (programmatic dependent launch): each of its programs
        must call ``gdc_wait`` before it touches what another kernel writes or reads, and before it ends.
        """
        device = tensors[0].device.index
        pointers = [tensor.data_ptr() for tensor in tensors]
        low_bits = 0
        for pointer in pointers:
            low_bits |= pointer
        key = None
        if low_bits % ALIGNMENT == 0 and device is not None:
            key = (device, fixed, constants, warps, stages, early, *[tensor.dtype for tensor in tensors])
            compiled = self._compiled.get(key)
            if compiled is not None:
                self._run(compiled, device, grid, (*pointers, *fixed, *free, *constants))
                return
        options = {"launch_pdl": True} if early else {}
        compiled = self._kernel[grid](
            *tensors, *fixed, *free, *constants, num_warps=warps, num_stages=stages, **options
        )
        if key is not None:
            self._compiled[key] = compiled
            Launcher.first_launches += 1

    def compile(
        self,
        types: tuple[torch.dtype, ...],
        fixed: tuple[int, ...],
        free: tuple[int | float, ...],
        constants: tuple[int | bool, ...],
        warps: int = 4,
        stages: int = 3,
        early: bool = False,
    ) -> None:
        """Compile into the cache on disk, without a launch, what ``__call__`` runs for aligned tensors of ``types``."""
        options = {"launch_pdl": True} if early else {}
        self._kernel.warmup(*types, *fixed, *free, *constants, grid=(1,), num_warps=warps, num_stages=stages, **options)

    @staticmethod
    def _run(compiled: Any, device: int, grid: tuple[int, int, int], arguments: tuple[int | float, ...]) -> None:
        if Launcher._direct:
            try:
                stream = driver.active.get_current_stream(device)
                function, metadata = compiled.function, compiled.packed_metadata
                compiled.run(*grid, stream, function, metadata, None, None, None, *arguments)
                return
            except (AttributeError, TypeError) as error:
                # Raised before anything is launched.
                Launcher._direct = False
                logger.info("kernels are launched more slowly: this Triton launches them in another way (%s)", error)
        compiled[grid](*arguments)
