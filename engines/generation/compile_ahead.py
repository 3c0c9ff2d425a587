"""Kernels that another process compiles while this one reads weights, so that the first steps only load binaries.

Nothing depends on it: what is not there when a step needs it is compiled in the step, as it would be without.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Literal

import msgspec
import torch

from engines.generation.placement import Placement, dtype_name
from engines.generation.threads import available_cores
from engines.kernels.cuda import OLDEST_CAPABILITY
from engines.kernels.cuda.binary_cache import BinaryCache, choose_folder, sources_digest
from engines.kernels.cuda.tuning import Machine, machine_of
from engines.manifest import Manifest
from engines.protocol import EngineSpec

Stage = Literal["measure", "start", "rest"]
"""When a kernel is first needed: in the measured step of the load, in the steps of one request alone, in any other."""
STAGES: tuple[Stage, ...] = ("measure", "start", "rest")
PATIENCE = 180.0
"""Seconds that a load waits for one stage; then it goes on and compiles by itself."""
MOST_PROCESSES = 32

_log = logging.getLogger(__name__)


class Sizes(msgspec.Struct, frozen=True):
    """Of an engine, as far as they decide which kernels it launches."""

    max_rows: int
    step_tokens: int
    model_len: int
    probe_context: int
    """Tokens of each sequence in the measured step."""


class Rehearsed(msgspec.Struct, frozen=True, kw_only=True):
    """The engine whose kernels are wanted."""

    spec: EngineSpec
    machine: Machine
    dtype: str
    """As users know it; so is ``kv_dtype``."""
    kv_dtype: str
    sizes: Sizes


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the compiling process is told; the cache's folder is in its environment."""

    engine: Rehearsed
    folder: str
    needs: str
    """Name of the list of this engine's kernels in the cache."""
    processes: int


class StageDone(msgspec.Struct, frozen=True, tag=True):
    """All kernels of this stage, and of those before it, are in the cache."""

    stage: Stage


class AllDone(msgspec.Struct, frozen=True, tag=True):
    """The compiling process has nothing more to do."""

    kernels: int
    seconds: float
    failures: tuple[str, ...] = ()
    """Kernels that could not be compiled, and why."""


class CompileAhead:
    """What the load of one engine sees of the process; without one, everything is there."""

    def __init__(self, name: str, process: subprocess.Popen[bytes] | None = None) -> None:
        """``process`` writes ``StageDone`` and ``AllDone`` as lines of JSON and leads a process group of its own."""
        self._name = name
        self._process = process
        self._closed = False
        self._done = {stage: threading.Event() for stage in STAGES}
        self._lock = threading.Lock()
        self._waiting: list[Callable[[], None]] = []
        if process is None:
            self._finish()
        else:
            threading.Thread(target=self._listen, args=(process,), name=f"kernels-{name}", daemon=True).start()

    def wait(self, stage: Stage) -> None:
        """Until the stage's kernels are there, or nobody compiles them any more, or patience ends."""
        if not self._done[stage].wait(PATIENCE):
            _log.warning("%s: GPU kernels are still being compiled after %.0f s", self._name, PATIENCE)

    def misses(self, stage: Stage) -> bool:
        """Whether ``wait`` would wait."""
        return not self._done[stage].is_set()

    def when_finished(self, call: Callable[[], None]) -> None:
        """Have it called once, from any thread, when nothing is being compiled any more."""
        with self._lock:
            if not self._done[STAGES[-1]].is_set():
                self._waiting.append(call)
                return
        call()

    def close(self) -> None:
        """Nobody needs the kernels any more."""
        self._closed = True
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        told: AllDone | None = None
        try:
            with process:
                assert process.stdout is not None
                for line in process.stdout:
                    told = self._hear(line)
        except msgspec.MsgspecError as error:
            _log.warning("%s: not understood from the process that compiles GPU kernels: %s", self._name, error)
        finally:
            self._finish()
        if told is not None:
            _log.info("%s: %d GPU kernels compiled ahead in %.1f s", self._name, told.kernels, told.seconds)
            for failure in told.failures:
                _log.warning("%s: a GPU kernel was not compiled: %s", self._name, failure)
        elif not self._closed:
            _log.warning("%s: the process that compiles GPU kernels ended early; steps compile them", self._name)

    def _hear(self, line: bytes) -> AllDone | None:
        message = msgspec.json.decode(line, type=StageDone | AllDone)
        if isinstance(message, AllDone):
            self._finish()
            return message
        for stage in STAGES[: STAGES.index(message.stage) + 1]:
            self._done[stage].set()
        return None

    def _finish(self) -> None:
        with self._lock:
            for done in self._done.values():
                done.set()
            waiting, self._waiting = self._waiting, []
        for call in waiting:
            call()


def compile_ahead(spec: EngineSpec, manifest: Manifest, placement: Placement, sizes: Sizes) -> CompileAhead:
    """Start to compile what the engine will launch, unless all of it is in the cache or its device runs no Triton."""
    device = placement.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return CompileAhead(spec.name)
    try:
        import triton
    except ImportError:
        return CompileAhead(spec.name)
    machine = machine_of(device.index)
    folder = choose_folder(str(triton.__version__), machine.name, machine.capability)
    engine = Rehearsed(
        spec=spec,
        machine=machine,
        dtype=dtype_name(placement.dtype),
        kv_dtype=dtype_name(placement.kv_dtype),
        sizes=sizes,
    )
    needs = _needs(engine, manifest, str(triton.__version__))
    if BinaryCache(folder).has_all(needs):
        return CompileAhead(spec.name)
    processes = max(1, min(available_cores() - 1, MOST_PROCESSES))
    return start(Order(engine=engine, folder=str(folder), needs=needs, processes=processes))


def start(order: Order) -> CompileAhead:
    """Start the compiling process; it ends with this one."""
    command = [sys.executable, "-m", "engines.generation.compile_main"]
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        process.stdin.flush()
    except OSError as error:
        _log.warning("%s: GPU kernels are not compiled ahead: %s", order.engine.spec.name, error)
        return CompileAhead(order.engine.spec.name)
    return CompileAhead(order.engine.spec.name, process)


def _needs(engine: Rehearsed, manifest: Manifest, triton_version: str) -> str:
    """The same for all starts that launch the same kernels."""
    parts = (
        manifest.fingerprint,
        engine.machine,
        engine.dtype,
        engine.kv_dtype,
        engine.sizes,
        engine.spec.uniform_routing,
        triton_version,
        sources_digest(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
