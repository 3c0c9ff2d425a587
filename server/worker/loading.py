"""Loads engines beside the worker's loop, so that a load never stops the steps of engines that serve already."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from engines import registry
from engines.protocol import Engine, EngineKind, EngineLoadError, EngineSpec, LoadPhase, LoadProgress
from server.worker.wire import Loaded, LoadFailed, Loading

PROGRESS_EVERY = 0.1
"""Seconds between two progress messages of one phase."""
SHORTEST_PHASE = 0.005
"""Seconds. What is shorter is not worth a word."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Prepare:
    kind: EngineKind
    device: str


class LoadThread:
    """One load at a time, because each measures the memory that is free. The loop takes the ``news`` when it can."""

    def __init__(
        self,
        incarnation: int,
        *,
        wake: Callable[[], None],
        clock: Callable[[], float],
        begun: float | None = None,
    ) -> None:
        """The process began at ``begun``, or now."""
        self._incarnation = incarnation
        self._wake = wake
        self._clock = clock
        self._phase_began = clock()
        self._phases = [] if begun is None else [LoadPhase("interpreter", self._phase_began - begun)]
        """Of the process, until its first load."""
        self._orders: queue.SimpleQueue[_Prepare | EngineSpec] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[tuple[Loading | Loaded | LoadFailed, Engine | None] | Exception]
        self._news = queue.SimpleQueue()
        self._open = 0
        self._progress = ("", 0.0)
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def busy(self) -> bool:
        return self._open > 0

    def prepare(self, kind: EngineKind, device: str) -> None:
        """Import already what a load of this kind needs."""
        self._orders.put(_Prepare(kind, device))

    def start(self, spec: EngineSpec) -> None:
        self._open += 1
        self._orders.put(spec)

    def news(self) -> list[tuple[Loading | Loaded | LoadFailed, Engine | None]]:
        """What happened since the last call. Raises what a load raised, but for EngineLoadError: that is a message."""
        taken = []
        while not self._news.empty():
            news = self._news.get()
            if isinstance(news, Exception):
                raise news
            self._open -= not isinstance(news[0], Loading)
            taken.append(news)
        return taken

    def _run(self) -> None:
        while True:
            spec = self._orders.get()
            if isinstance(spec, _Prepare):
                registry.prepare(spec.kind, spec.device)
                self._phase_ended("libraries")
                continue
            if self._phases:  # of this process's start; later ones wait for a user
                self._phase_ended("order")
            phases, self._phases = self._phases, []
            try:
                engine = registry.create(spec, partial(self._report, spec.name))
                _tell(engine.info.name, [*phases, *engine.info.load_phases])
                self._news.put((Loaded(self._incarnation, engine.info, engine.capacity), engine))
            except EngineLoadError as error:
                if error.__cause__ is not None:
                    log.error("%s cannot be loaded", spec.name, exc_info=error.__cause__)
                self._news.put((LoadFailed(self._incarnation, spec.name, str(error)), None))
            except Exception as error:  # noqa: BLE001 - the loop raises it: the worker dies with the traceback
                self._news.put(error)
            self._wake()

    def _phase_ended(self, name: str) -> None:
        now = self._clock()
        self._phases.append(LoadPhase(name, now - self._phase_began))
        self._phase_began = now

    def _report(self, name: str, progress: LoadProgress) -> None:
        phase, reported_at = self._progress
        now = self._clock()
        if progress.phase != phase or now - reported_at >= PROGRESS_EVERY or progress.done == progress.total:
            self._progress = (progress.phase, now)
            self._news.put((Loading(self._incarnation, name, progress), None))
            self._wake()


def _tell(name: str, phases: list[LoadPhase]) -> None:
    """For those who wonder where a start's time goes: ``benchmarks/startup.py`` reads this line."""
    total = sum(phase.seconds for phase in phases)
    parts = ", ".join(f"{phase.name} {phase.seconds:.2f}" for phase in phases if phase.seconds >= SHORTEST_PHASE)
    log.info("%s: loaded in %.2f s: %s", name, total, parts)
