"""Makes Triton's keys of compiled kernels the same in every process.

Triton (3.6) finds a kernel's key when it is first asked for, and takes into it the constants of the functions that the
kernel calls, but only of those whose own keys are known by then: so the key depends on what was compiled before.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from triton.runtime.jit import JITFunction


def settle_key(kernel: Any) -> None:
    """Find the kernel's key after those of all that it calls. Does nothing for Triton's interpreter."""
    if not isinstance(kernel, JITFunction) or kernel.hash is not None:
        return
    for callee in _callees(kernel):
        if callee is not kernel:
            settle_key(callee)
    _ = kernel.cache_key


def _callees(kernel: Any) -> Iterator[Any]:
    """Whatever the kernel's code may mean by its names: globals, and attributes of modules among them."""
    names = kernel.fn.__code__.co_names
    found = [kernel.fn.__globals__.get(name) for name in names]
    modules = [value for value in found if isinstance(value, ModuleType)]
    found += [getattr(module, name, None) for module in modules for name in names]
    return (value for value in found if isinstance(value, JITFunction))
