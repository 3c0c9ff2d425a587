"""Launching Triton kernels at a fraction of the host time that Triton's own launcher takes.

Triton inspects every argument at every launch to find which specialisation to run. Here a kernel's arguments come
sorted by what they mean for that, so that one dictionary look-up finds the compiled kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from triton.runtime import driver

from engines.kernels.cuda.cache_keys import settle_key

ALIGNMENT = 16
"""Bytes. Triton compiles wider loads for pointers that are multiples of this."""

INT32 = range(-(1 << 31), 1 << 31)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TileType:
    """Of a ``Tiled`` matrix, what a kernel is compiled for."""

    dtype: torch.dtype
    tile: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tiled:
    """A matrix of 16-bit numbers with contiguous rows, for a Gluon kernel that moves tiles of it by hardware (TMA)."""

    matrix: torch.Tensor
    tile: tuple[int, int]
    """Rows, and columns: 128 bytes, or more that are moved in parts of 128."""

    @property
    def type(self) -> TileType:
        return TileType(self.matrix.dtype, self.tile)

    def descriptor(self) -> Any:
        from triton.experimental.gluon.language import NVMMASharedLayout
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        matrix = self.matrix
        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(self.tile), layout)


@dataclass(frozen=True, slots=True)
class Specialisation:
    """All that Triton compiles a launch by: two launches with equal ones run the same binary."""

    launcher: Launcher
    types: tuple[tuple[torch.dtype, bool], ...]
    """Of the tensors, and whether each begins at a multiple of ``ALIGNMENT``."""
    fixed: tuple[int, ...]
    free: tuple[int | float, ...]
    constants: tuple[int | bool, ...]
    warps: int
    stages: int
    early: bool
    tiled: tuple[TileType, ...] = ()

    @property
    def name(self) -> str:
        """Of the kernel."""
        return str(self.launcher.kernel.__name__)

    def representative(self) -> Specialisation:
        """The same one for all launches that Triton does not tell apart: of integers it sees whether they are 1 or
        multiples of 16 and how wide they are, of ``free`` ones the width alone."""
        fixed = tuple(_representative(value) for value in self.fixed)
        free = tuple(0.0 if isinstance(value, float) else _widest(value) for value in self.free)
        return Specialisation(
            self.launcher, self.types, fixed, free, self.constants, self.warps, self.stages, self.early, self.tiled
        )

    def compile(self) -> Any:
        """Put the binary into the cache on disk, unless it is there; needs no GPU. Returns Triton's kernel.

        Raises whatever Triton raises for a kernel that it cannot compile.
        """
        tensors = [dtype if aligned else _Unaligned(dtype) for dtype, aligned in self.types]
        tiled = [Tiled(torch.empty(one.tile, dtype=one.dtype, device="meta"), one.tile) for one in self.tiled]
        arguments = (*[one.descriptor() for one in tiled], *tensors, *self.fixed, *self.free, *self.constants)
        settle_key(self.launcher.kernel)
        return self.launcher.kernel.warmup(*arguments, grid=(1,), **_options(self.warps, self.stages, self.early))


class _Unaligned:
    """Stands for a tensor of which Triton may not assume where it begins."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @staticmethod
    def data_ptr() -> int:
        return 1


def _representative(value: int) -> int:
    if value == 1 or value not in INT32:
        return value
    return 0 if value % 16 == 0 else 2


def _widest(value: int) -> int:
    return 0 if value in INT32 else value


def _options(warps: int, stages: int, early: bool) -> dict[str, int | bool]:
    options: dict[str, int | bool] = {"num_warps": warps, "num_stages": stages}
    return options | {"launch_pdl": True} if early else options


class Launcher:
    """Launches one kernel whose parameters are, in this order: ``tiled``, tensors, ``fixed``, ``free``, ``constants``.

    Tensors on the CPU go through Triton's interpreter, which must have been on (``TRITON_INTERPRET=1``) when the
    kernel was defined.
    """

    _direct = True
    """Whether this Triton's compiled kernels are called as its own launcher calls them, which no document promises."""

    first_launches = 0
    """Of all kernels in all their forms so far: each compiles, or reads what was compiled, and takes up to seconds."""

    recorder: ClassVar[Callable[[Specialisation], None] | None] = None
    """Where set, nothing is launched: it is told what would have been. Tensors may then be on the meta device."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
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
        tiled: tuple[Tiled, ...] = (),
    ) -> None:
        """``fixed`` integers (widths, strides), ``constants`` and what follows them get a compiled kernel for each
        combination.

        ``free`` are floats, and integers that the kernel names in ``do_not_specialize``. With ``early`` the kernel may
        start while the one before it in the stream still runs (programmatic dependent launch): each of its programs
        must call ``gdc_wait`` before it touches what another kernel writes or reads, and before it ends.
        """
        kinds = tuple(one.type for one in tiled)
        if Launcher.recorder is not None:
            types = tuple((tensor.dtype, _is_aligned(tensor)) for tensor in tensors)
            Launcher.recorder(Specialisation(self, types, fixed, free, constants, warps, stages, early, kinds))
            return
        descriptors = [one.descriptor() for one in tiled]
        device = tensors[0].device.index
        pointers = [tensor.data_ptr() for tensor in tensors]
        low_bits = 0
        for pointer in pointers:
            low_bits |= pointer
        key = None
        if low_bits % ALIGNMENT == 0 and device is not None:
            key = (device, fixed, constants, warps, stages, early, kinds, *[tensor.dtype for tensor in tensors])
            compiled = self._compiled.get(key)
            if compiled is not None:
                self._run(compiled, device, grid, (*descriptors, *pointers, *fixed, *free, *constants))
                return
        arguments = (*descriptors, *tensors, *fixed, *free, *constants)
        settle_key(self.kernel)
        compiled = self.kernel[grid](*arguments, **_options(warps, stages, early))
        if key is not None:
            self._compiled[key] = compiled
            Launcher.first_launches += 1

    @staticmethod
    def _run(compiled: Any, device: int, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
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


def _is_aligned(tensor: torch.Tensor) -> bool:
    """Whether it begins where Triton compiles wider loads. A tensor on the meta device stands for one in memory whose
    allocation is aligned, as those of torch's allocators are."""
    if tensor.is_meta:
        return tensor.storage_offset() * tensor.itemsize % ALIGNMENT == 0
    return tensor.data_ptr() % ALIGNMENT == 0
