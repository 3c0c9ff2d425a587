"""Which implementation serves a tensor: the native C library, Triton kernels, or plain torch."""

from __future__ import annotations

import torch

from engines.kernels.cuda import TritonKernels
from engines.kernels.cuda import shared_triton as shared_triton
from engines.kernels.native import shared_native
from engines.kernels.native.library import TYPE_CODES
from engines.kernels.reference import FP8

native = shared_native()
"""The C library for CPU tensors; None where it cannot be used."""

TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16, FP8)


def fits_native(*tensors: torch.Tensor) -> bool:
    """Whether all lie on the CPU in one type that the library knows, with a contiguous last dimension."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype is not dtype or tensor.stride(-1) != 1:
            return False
    return dtype in TYPE_CODES


def triton_for(*tensors: torch.Tensor) -> TritonKernels | None:
    """The Triton kernels, if all lie on a GPU in types that they know, with a contiguous last dimension.

    Tensors on the meta device count as a GPU's: there are kernels for them in a rehearsal only.
    """
    for tensor in tensors:
        if tensor.is_cpu or tensor.dtype not in TRITON_TYPES or tensor.stride(-1) != 1:
            return None
    return shared_triton()
