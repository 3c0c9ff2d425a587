"""The life of one worker from the API process's side: start, load, watch, bury, start again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import msgspec
import zmq

from engines.protocol import EngineSpec
from server.errors import SlimserveError
from server.worker.channel import Channel
from server.worker.engine_status import EnginePhase, EngineStatus, WorkerSettings
from server.worker.process import STOP_TIMEOUT, RuntimeFolder, WorkerProcess
from server.worker.watch import Backoff, Cause, Fault, Watchdog
from server.worker.wire import (
    Configure,
    FromWorker,
    Hello,
    Loaded,
    LoadEngine,
    LoadFailed,
    Loading,
    LoadReport,
    Refused,
    StepOutputs,
    Stop,
    ToWorker,
    UnloadEngine,
)

log = logging.getLogger(__name__)

KILL_PATIENCE = 15.0
"""Seconds after which a killed process should have gone. A driver that hangs can keep it for ever."""


class WorkerOwner(Protocol):
    """Who is told what happens to a worker: the supervisor."""

    def engine_changed(self, worker: Worker, status: EngineStatus) -> None:
        """A phase or a load's progress changed."""

    def outputs(self, worker: Worker, outputs: StepOutputs) -> None:
        """A step was settled."""

    def refused(self, worker: Worker, refused: Refused) -> None:
        """The scheduler did not take items."""

    def reported(self, worker: Worker, report: LoadReport) -> None:
        """Gauges came."""

    def lost(self, worker: Worker, launched: Collection[int]) -> None:
        """The process is gone; it had launched steps with these items and not settled them."""

    def restarted(self, worker: Worker, cause: Cause) -> None:
        """A process was started in place of one that was lost because of this."""


class Worker:
    """One device and its engines, over as many processes as it takes. ``run`` ends when nothing is left to serve."""

    def __init__(
        self,
        index: int,
        specs: Sequence[EngineSpec],
        settings: WorkerSettings,
        owner: WorkerOwner,
        folder: RuntimeFolder,
        clock: Callable[[], float],
        started: WorkerProcess | None = None,
    ) -> None:
        """``started`` is the process of the first incarnation, where it runs already."""
        self.index = index
        self.engines = {spec.name: EngineStatus(spec) for spec in specs}
        self._settings = settings
        self._owner = owner
        self._folder = folder
        self._clock = clock
        self._incarnation = 0
        self._backoff = Backoff(settings.max_restarts)
        self._started = started
        self._process: WorkerProcess | None = None
        self._killed_at: float | None = None
        self._channel: Channel | None = None
        self._watchdog = self._new_watchdog()
        self._interrupt = asyncio.Event()
        self._fault: Fault | None = None
        self._stopping = False
        self._greeted = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def stuck(self, now: float) -> bool:
        """Its process was killed and does not go, so that no other can take its place."""
        return self._killed_at is not None and now - self._killed_at > KILL_PATIENCE

    def serves(self, engine: str, version: int) -> bool:
        status = self.engines.get(engine)
        if status is None or self._channel is None:
            return False
        return status.phase == "ready" and status.version == version and not status.retired

    def send(self, message: ToWorker) -> None:
        """Raises Overloaded when the worker is gone or does not keep up."""
        if self._channel is not None:
            self._channel.send(message)

    # --- reload

    def configure(self, settings: WorkerSettings) -> bool:
        """Go on with other settings; True when the process forgets all its items for that."""
        changed = settings.scheduler != self._settings.scheduler
        self._settings = settings
        self._watchdog.patience(settings.step_timeout, settings.load_timeout)
        self._backoff.budget = settings.max_restarts
        if changed:
            self._command(Configure(msgspec.json.encode(settings.scheduler)))
        return changed and self._greeted

    def load(self, spec: EngineSpec, version: int, *, awaited: bool = False) -> None:
        """Hold one more engine."""
        status = self.engines[spec.name] = EngineStatus(spec, version, awaited)
        if self._greeted:
            self._command(LoadEngine(spec))
            self._set(status, "loading")
            self._watchdog.loading(self._clock(), unfinished=True)

    def unload(self, name: str) -> None:
        """Forget an engine; nothing of it may be open. Raises KeyError for an unknown name."""
        del self.engines[name]
        self._command(UnloadEngine(name))

    def _command(self, message: ToWorker) -> None:
        """A process that has not said hello hears all of it then."""
        if not self._greeted:
            return
        try:
            self.send(message)
        except SlimserveError:
            self._end_process("it does not keep up with its commands")

    # --- life

    def kill(self) -> None:
        """At once, for the second signal."""
        self._stopping = True
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        """Ask it to exit and kill it when it does not. ``run`` returns afterwards. Idempotent."""
        self._stopping = True
        if self._process is None or self._channel is None:
            self._interrupt.set()
            return
        try:
            self._channel.send(Stop())
            await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT)
        except (SlimserveError, TimeoutError):
            self._process.kill()

    async def run(self) -> None:
        while not self._stopping:
            fault = await self._live()
            if self._stopping or not self._open_engines():
                return
            pause = self._backoff.failed()
            if pause is None:
                log.error("worker %d is given up: %s", self.index, fault.text)
                self._set_all("failed", "its worker process keeps failing and was given up")
                return
            when = f"in {pause:.1f} s" if pause else "at once"
            log.error("worker %d died: %s; it starts again %s", self.index, fault.text, when)
            if not await self._sleep(pause):
                self._owner.restarted(self, fault.cause)

    async def _sleep(self, seconds: float) -> bool:
        """True when ``stop`` was called meanwhile."""
        self._interrupt.clear()
        try:
            await asyncio.wait_for(self._interrupt.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _live(self) -> Fault:
        """One process from its start to its end; the reason of the end."""
        self._incarnation += 1
        self._interrupt.clear()
        self._fault = None
        self._watchdog = self._new_watchdog()
        address = self._folder.address(self.index, self._incarnation)
        self._process, self._started = self._started, None
        try:
            self._channel = Channel(address, self._on_message, self._on_bad_message)
            if self._process is None:
                self._process = self._start(address)
            return await self._watch(self._process)
        except (OSError, zmq.ZMQError) as error:
            return Fault("died", f"it cannot be started: {error}")
        finally:
            await self._bury()

    def _start(self, address: str) -> WorkerProcess:
        first = next((status.spec for status in self._open_engines()), EngineSpec(name="", kind="fake"))
        return WorkerProcess.start(address, self._incarnation, self._settings, first.kind, first.device)

    async def _bury(self) -> None:
        """Other workers and readiness first: the process may take a while to go, and the next waits for that."""
        self._greeted = False
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.kill()
        self._set_all("restarting", "its worker process stopped and is being restarted")
        self._owner.lost(self, set() if self._process is None else self._process.record.items())
        if self._process is not None:
            self._killed_at = self._clock()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.end(), KILL_PATIENCE if self._stopping else None)
            self._process.record.close()
            self._process = self._killed_at = None

    async def _watch(self, process: WorkerProcess) -> Fault:
        tick = min(1.0, self._settings.step_timeout / 8)
        exited = asyncio.ensure_future(process.wait())
        interrupt = asyncio.ensure_future(self._interrupt.wait())
        try:
            while True:
                await asyncio.wait({exited, interrupt}, timeout=tick, return_when=asyncio.FIRST_COMPLETED)
                if exited.done():
                    return Fault("died", exited.result())
                if interrupt.done():
                    return self._fault or Fault("died", "the server stops")
                stuck = self._watchdog.verdict(self._clock(), tick)
                if stuck is not None:
                    return stuck
        finally:
            exited.cancel()
            interrupt.cancel()

    # --- messages

    def _on_message(self, message: FromWorker) -> None:
        if message.incarnation != self._incarnation:
            return
        now = self._clock()
        self._watchdog.heard(now)
        match message:
            case StepOutputs():
                self._backoff.settled()
                self._watchdog.settled(now)
                self._owner.outputs(self, message)
            case LoadReport():
                self._watchdog.report(message, now)
                self._owner.reported(self, message)
            case Refused():
                self._owner.refused(self, message)
            case Hello():
                self._greeted = True
                self._load_all(now)
            case Loading(_, name, progress) if name in self.engines:
                self.engines[name].progress = progress
                self._set(self.engines[name], "loading")
            case Loaded() if message.info.name in self.engines:
                self._loaded(message, now)
            case LoadFailed(_, name, reason) if name in self.engines:
                self._load_failed(self.engines[name], reason, now)

    def _on_bad_message(self, error: Exception) -> None:
        log.error("a message of worker %d could not be handled", self.index, exc_info=error)
        self._end_process("a message of it could not be handled")

    def _load_all(self, now: float) -> None:
        for status in self._open_engines():
            self.send(LoadEngine(status.spec_to_load))
            self._set(status, "loading")
        self._watchdog.loading(now, unfinished=True)

    def _loaded(self, message: Loaded, now: float) -> None:
        status = self.engines[message.info.name]
        status.info, status.capacity, status.progress = message.info, message.capacity, None
        self._set(status, "ready")
        self._watchdog.loading(now, self._any_loading())

    def _load_failed(self, status: EngineStatus, reason: str, now: float) -> None:
        if status.info is not None:
            # It loaded before: what is in the way now may go away.
            self._end_process(f"{status.spec.name} cannot be loaded again: {reason}")
            return
        log.error("%s cannot be served: %s", status.spec.name, reason.removeprefix(f"{status.spec.name}: "))
        self._set(status, "failed", reason)
        self._watchdog.loading(now, self._any_loading())
        if not self._open_engines():
            self._end_process("no engine is left")

    def _end_process(self, reason: str) -> None:
        self._fault = Fault("broken", reason)
        self._interrupt.set()

    # --- state

    def _new_watchdog(self) -> Watchdog:
        return Watchdog(
            self._clock(), step_timeout=self._settings.step_timeout, load_timeout=self._settings.load_timeout
        )

    def _open_engines(self) -> list[EngineStatus]:
        return [status for status in self.engines.values() if status.phase != "failed"]

    def _any_loading(self) -> bool:
        return any(status.phase == "loading" for status in self.engines.values())

    def _set_all(self, phase: EnginePhase, reason: str) -> None:
        for status in self._open_engines():
            status.progress = None
            self._set(status, phase, reason)

    def _set(self, status: EngineStatus, phase: EnginePhase, reason: str = "") -> None:
        status.phase, status.reason = phase, reason
        self._owner.engine_changed(self, status)
