"""What a process on a GPU needs besides libraries, done while it imports them: without torch, in threads of its own.

Each takes from a tenth of a second to more than one, nearly all of it without Python's lock. Whatever fails here is
left to those who need it, who try again and tell.
"""

from __future__ import annotations

import ctypes
import os
import threading


def open_gpu(device: str) -> None:
    """Begin to create the primary context of ``cuda:N``, which torch then finds, and to hash Triton."""
    # As torch sets it, but before the driver reads it.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    index = int(device.partition(":")[2] or 0)
    threading.Thread(target=_create_context, args=(index,), name="gpu-context", daemon=True).start()
    threading.Thread(target=hash_triton, name="triton-hash", daemon=True).start()


def hash_triton() -> None:
    """Triton's name for itself in the keys of compiled kernels, over some 400 MB; it remembers the answer."""
    try:
        from triton.runtime.cache import triton_key
    except ImportError:
        return
    triton_key()


def _create_context(index: int) -> None:
    """The process keeps it for its life."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
