"""The engine of language models: one thread of its own, in which a model is loaded and every step runs."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import torch

from engines.generation.launched import LaunchedStep
from engines.generation.loading import Loaded, load
from engines.protocol import Capacity, EngineInfo, EngineSpec, ReportProgress, StepPlan, StepResult

MAX_IN_FLIGHT = 2

_log = logging.getLogger(__name__)


class GenerationEngine:
    """Computes plans over rows of a language model. ``engines.protocol.Engine`` says who may call what, when.

    A step runs in the engine's own thread: on the CPU it is computed there, on a GPU it is enqueued there, so
    ``launch`` only puts a plan on a queue. After a step has raised, no later one runs.
    """

    def __init__(self, loaded: Loaded, thread: ThreadPoolExecutor) -> None:
        """For ``load``: ``loaded`` must come from ``thread``, which is the engine's from here on."""
        self._loaded: Loaded | None = loaded
        self._info = loaded.info
        self._capacity = loaded.capacity
        self._thread = thread
        self._in_flight: deque[tuple[int, Future[LaunchedStep]]] = deque()
        self._failure: BaseException | None = None
        self._capture_ended = threading.Event()
        self._closing = False
        loaded.kernels.when_finished(self._queue_capture)

    @classmethod
    def load(
        cls, spec: EngineSpec, report: ReportProgress, clock: Callable[[], float] = time.perf_counter
    ) -> GenerationEngine:
        """Load the model that ``spec`` names; ``report`` is called from another thread while this one waits.

        Raises EngineLoadError, whose text tells the user what to do.
        """
        thread = ThreadPoolExecutor(1, thread_name_prefix=f"engine-{spec.name}")
        try:
            return cls(thread.submit(load, spec, report, clock).result(), thread)
        except BaseException:
            thread.shutdown(wait=False)
            raise

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    def wait_captured(self, timeout: float) -> bool:
        """Wait until no more CUDA graphs are being captured; False when that takes longer than ``timeout`` seconds."""
        return self._capture_ended.wait(timeout)

    def launch(self, plan: StepPlan) -> int:
        """Queue the step for the engine's thread. Raises RuntimeError when two are in flight or after ``close``."""
        if len(self._in_flight) == MAX_IN_FLIGHT:
            raise RuntimeError(f"step {plan.step} launched while {MAX_IN_FLIGHT} are in flight")
        self._in_flight.append((plan.step, self._thread.submit(self._run, plan)))
        return plan.step

    def collect(self, ticket: int) -> StepResult:
        """Wait for the oldest step. Raises what the step raised, RuntimeError when it is not ``ticket``."""
        if not self._in_flight or self._in_flight[0][0] != ticket:
            raise RuntimeError(f"step {ticket} is not the oldest in flight")
        return self._in_flight.popleft()[1].result().result()

    def close(self) -> None:
        """Give back all memory; a second call does nothing."""
        self._closing = True
        if self._loaded is not None:
            self._loaded.kernels.close()
        self._thread.shutdown()
        on_gpu = self._loaded is not None and self._info.device != "cpu"
        self._loaded = None
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()

    def _queue_capture(self) -> None:
        """From any thread. Before all kernels are there a capture would compile them, and hold up the steps."""
        try:
            self._thread.submit(self._capture)
        except RuntimeError:  # closed meanwhile
            self._capture_ended.set()

    def _capture(self) -> None:
        """In the engine's thread: capture one graph, and queue up for the next behind the steps that came meanwhile."""
        captured = None if self._loaded is None else self._loaded.runner.captured
        if captured is None or self._closing or self._failure is not None:
            self._capture_ended.set()
            return
        try:
            more = captured.capture_next()
            self._capacity = msgspec.structs.replace(
                self._capacity, graph_rows=captured.rows, graph_tokens=captured.tokens
            )
            if more:
                self._thread.submit(self._capture)
                return
        except RuntimeError as error:
            # Every step can run without a graph, as some do that a graph cannot hold.
            if not self._closing:
                _log.warning("%s: no more CUDA graphs are captured: %s", self._info.name, error)
        except BaseException as failure:
            self._failure = failure
            raise
        self._capture_ended.set()

    def _run(self, plan: StepPlan) -> LaunchedStep:
        if self._failure is not None:
            raise self._failure
        try:
            if self._loaded is None:
                raise RuntimeError("the engine is closed")
            return self._loaded.runner.run(plan)
        except BaseException as failure:
            self._failure = failure
            raise
