"""Loads engines beside the worker's loop, so that a load never stops the steps of engines that serve already."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from functools import partial

from engines import registry
from engines.protocol import Engine, EngineLoadError, EngineSpec, LoadProgress
from server.worker.wire import Loaded, LoadFailed, Loading

PROGRESS_EVERY = 0.1
"""Seconds between two progress messages of one phase."""

log = logging.getLogger(__name__)


class LoadThread:
    """One load at a time, because each measures the memory that is free. The loop takes the ``news`` when it can."""

    def __init__(self, incarnation: int, *, wake: Callable[[], None], clock: Callable[[], float]) -> None:
        self._incarnation = incarnation
        self._wake = wake
        self._clock = clock
        self._specs: queue.SimpleQueue[EngineSpec] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[tuple[Loading | Loaded | LoadFailed, Engine | None] | Exception]
        self._news = queue.SimpleQueue()
        self._open = 0
        self._progress = ("", 0.0)
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def busy(self) -> bool:
        return self._open > 0

    def start(self, spec: EngineSpec) -> None:
        self._open += 1
        self._specs.put(spec)

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
            spec = self._specs.get()
            try:
                engine = registry.create(spec, partial(self._report, spec.name))
                self._news.put((Loaded(self._incarnation, engine.info, engine.capacity), engine))
            except EngineLoadError as error:
                if error.__cause__ is not None:
                    log.error("%s cannot be loaded", spec.name, exc_info=error.__cause__)
                self._news.put((LoadFailed(self._incarnation, spec.name, str(error)), None))
            except Exception as error:  # noqa: BLE001 - the loop raises it: the worker dies with the traceback
                self._news.put(error)
            self._wake()

    def _report(self, name: str, progress: LoadProgress) -> None:
        phase, reported_at = self._progress
        now = self._clock()
        if progress.phase != phase or now - reported_at >= PROGRESS_EVERY or progress.done == progress.total:
            self._progress = (progress.phase, now)
            self._news.put((Loading(self._incarnation, name, progress), None))
            self._wake()
