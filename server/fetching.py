"""Finds the models of the configuration while the server answers already: a download may take many minutes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from engines.protocol import EngineLoadError
from server.api.state import Model, ModelState
from server.display import ServeDisplay
from server.served_models import LocatedModel, locate, read_model
from server.settings import ModelSettings

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FoundModels:
    """By served name."""

    located: dict[str, LocatedModel]
    read: dict[str, Model]


class Fetching:
    """``run`` fetches what is not here, and reads what the API needs of each model. All but the work itself happens on
    the event loop."""

    def __init__(self, entries: Sequence[ModelSettings], display: ServeDisplay) -> None:
        self._entries = entries
        self._display = display
        self._states = {entry.served_name: ModelState(name=entry.served_name, state="starting") for entry in entries}
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def states(self) -> Sequence[ModelState]:
        """How far each model is."""
        return list(self._states.values())

    async def run(self) -> FoundModels:
        """Raises UsageError, CommandFailed and EngineLoadError. What is fetched when it is cancelled is abandoned."""
        self._loop = asyncio.get_running_loop()
        try:
            return await _in_daemon_thread(self._work)
        finally:
            self._loop = None

    def _work(self) -> FoundModels:
        located = {entry.served_name: locate(entry, self) for entry in self._entries}
        read: dict[str, Model] = {}
        try:
            for name, model in located.items():
                read[name] = read_model(model)
        except EngineLoadError:
            for each in read.values():
                each.close()
            raise
        return FoundModels(located, read)

    # --- PullDisplay, called in the thread of the work

    def pulling(self, name: str, what: str, done: int, total: int) -> None:
        self._tell(self._pulling, name, what, done, total)

    def pulled(self, name: str) -> None:
        self._tell(self._pulling, name, "", 0, 0)

    def _tell(self, listener: Callable[..., None], *news: object) -> None:
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody looks any more
                loop.call_soon_threadsafe(listener, *news)

    def _pulling(self, name: str, what: str, done: int, total: int) -> None:
        """``what`` is empty at the end."""
        if self._loop is None:
            return
        self._states[name] = replace(self._states[name], phase=what, done=done, total=total)
        if what:
            self._display.pulling(name, what, done, total)
        else:
            self._display.pulled(name)


async def _in_daemon_thread(work: Callable[[], T]) -> T:
    """In a thread that the end of this process does not wait for, as it does for those of an executor."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if outcome.done():
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(cast(T, result))

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - it is raised where the result is awaited
            failure = error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="fetch", daemon=True).start()
    return await outcome
