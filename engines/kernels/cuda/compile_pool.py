"""Compiles kernels into the cache on disk, in several processes and without a GPU.

For a process that has no other threads: the compiling ones are forked off it, so that what took seconds to import is
there at once. They take their tasks from a pipe and end with it, also where this process is killed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from engines.kernels.cuda.cache_keys import settle_key
from engines.kernels.cuda.launch import Specialisation

INDEX_BYTES = 4
MOST_TASKS = 8192
"""Their indices fit in a pipe, which holds 64 KiB."""
LONGEST_ERROR = 300
WARP = 32
"""Threads."""


class Compiled(msgspec.Struct, frozen=True):
    """What became of one task."""

    index: int
    """In the list of tasks."""
    seconds: float
    entry: str = ""
    """Its folder in the cache."""
    error: str = ""


class _Offline:
    """Of Triton's driver what compiling asks for."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._target = GPUTarget("cuda", 10 * capability[0] + capability[1], WARP)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(capability: tuple[int, int]) -> None:
    """From now on this process compiles for GPUs of that compute capability, and launches nothing."""
    driver.set_active(_Offline(capability))


class CompilePool:
    """Processes that compile a list of tasks, the first ones first. Needs ``compile_for``."""

    def __init__(self, wanted: Sequence[Specialisation], processes: int) -> None:
        """Forks. Raises ValueError for more than ``MOST_TASKS``."""
        if len(wanted) > MOST_TASKS:
            raise ValueError(f"{len(wanted)} kernels are too many to compile at once")
        for launcher in {one.launcher for one in wanted}:
            settle_key(launcher.kernel)  # once, for all processes
        tasks, tasks_in = os.pipe()
        self._results, results_in = os.pipe()
        os.write(tasks_in, b"".join(index.to_bytes(INDEX_BYTES, "little") for index in range(len(wanted))))
        os.close(tasks_in)
        self._workers = []
        for _ in range(min(processes, len(wanted))):
            worker = os.fork()
            if not worker:
                os.close(self._results)
                _work(wanted, tasks, results_in)
            self._workers.append(worker)
        os.close(tasks)
        os.close(results_in)

    def results(self) -> Iterator[Compiled]:
        """Each task's as it is done; none for one during which its process died."""
        with os.fdopen(self._results, "rb") as lines:
            for line in lines:
                yield msgspec.json.decode(line, type=Compiled)
        for worker in self._workers:
            os.waitpid(worker, 0)


def _work(wanted: Sequence[Specialisation], tasks: int, results: int) -> NoReturn:
    """In a forked process."""
    while index := os.read(tasks, INDEX_BYTES):
        compiled = _compile(wanted, int.from_bytes(index, "little"))
        os.write(results, msgspec.json.encode(compiled) + b"\n")
    os._exit(0)


def _compile(wanted: Sequence[Specialisation], index: int) -> Compiled:
    began = time.perf_counter()
    entry = error = ""
    try:
        kernel = wanted[index].compile()
        entry = next(Path(path).parent.name for path in kernel.metadata_group.values())
        _build_launcher(kernel)
    except Exception as failure:  # noqa: BLE001 - one kernel that fails must not end the others; the launch will say it
        error = f"{type(failure).__name__}: {failure}"[:LONGEST_ERROR]
    return Compiled(index, round(time.perf_counter() - began, 3), entry, error)


def _build_launcher(kernel: Any) -> None:
    """The C function through which Triton calls a kernel; where this Triton has none, or the machine no driver to link
    with, the first launch sees to it."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(kernel.src, kernel.metadata)
    except (ImportError, AssertionError, AttributeError, TypeError, OSError, RuntimeError):
        return
