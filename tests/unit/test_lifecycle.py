"""A worker's life where the operating system does not play along; the rest is in tests/integration."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from engines.protocol import EngineSpec
from server.admission import Door
from server.metrics import Metrics
from server.scheduler.config import SchedulerConfig
from server.worker.engine_status import EngineStatus, WorkerSettings
from server.worker.flight_record import FlightRecord
from server.worker.lifecycle import KILL_PATIENCE, Worker
from server.worker.process import RuntimeFolder, WorkerProcess
from server.worker.supervisor import Supervisor
from server.worker.watch import Cause
from server.worker.wire import LoadReport, Refused, StepOutputs


class Owner:
    """Hears of everything and waits for a new process."""

    def __init__(self) -> None:
        self.restarts = asyncio.Event()

    def engine_changed(self, worker: Worker, status: EngineStatus) -> None: ...

    def outputs(self, worker: Worker, outputs: StepOutputs) -> None: ...

    def refused(self, worker: Worker, refused: Refused) -> None: ...

    def reported(self, worker: Worker, report: LoadReport) -> None: ...

    def lost(self, worker: Worker, launched: Collection[int]) -> None: ...

    def restarted(self, worker: Worker, cause: Cause) -> None:
        assert cause == "broken"
        self.restarts.set()


class HungProcess:
    """A process inside a driver call: SIGKILL ends it only once the call returns. No real one can be made to order."""

    pid = 1
    record: FlightRecord

    def __init__(self) -> None:
        self.watched = asyncio.Event()
        self.killed = asyncio.Event()
        self.awaited = asyncio.Event()
        self.returns = asyncio.Event()

    def kill(self) -> None:
        self.killed.set()

    async def wait(self) -> str:
        self.watched.set()
        await self.returns.wait()
        return "it ended by SIGKILL"

    async def end(self) -> None:
        self.awaited.set()
        await self.returns.wait()


def hung_processes(monkeypatch: pytest.MonkeyPatch) -> HungProcess:
    """The only process that is ever started."""
    hung = HungProcess()

    def start(*_: object) -> HungProcess:
        hung.record = FlightRecord.create()
        return hung

    monkeypatch.setattr(WorkerProcess, "start", start)
    return hung


def test_a_killed_process_that_does_not_go_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        now, folder, owner = 100.0, RuntimeFolder(), Owner()
        hung = hung_processes(monkeypatch)
        settings = WorkerSettings(scheduler=SchedulerConfig())
        worker = Worker(0, [EngineSpec(name="m")], settings, owner, folder, lambda: now)
        life = asyncio.create_task(worker.run())
        try:
            await hung.watched.wait()
            worker._end_process("it makes no sense")
            await hung.awaited.wait()
            assert hung.killed.is_set()
            now += KILL_PATIENCE - 1
            assert not worker.stuck(now), "a process takes its time to go"
            now += 2
            assert worker.stuck(now)
            hung.returns.set()
            await owner.restarts.wait()
            assert not worker.stuck(now)
        finally:
            hung.returns.set()
            worker.kill()
            await life
            folder.remove()

    asyncio.run(main())


def test_a_process_that_cannot_be_killed_does_not_hold_up_the_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        hung = hung_processes(monkeypatch)
        monkeypatch.setattr("server.worker.supervisor.KILL_PATIENCE", 0.01)
        monkeypatch.setattr("server.worker.lifecycle.KILL_PATIENCE", 0.01)
        monkeypatch.setattr("server.worker.lifecycle.STOP_TIMEOUT", 0.01)
        supervisor = Supervisor(
            WorkerSettings(scheduler=SchedulerConfig()),
            metrics=Metrics(["m"], version="1"),
            clock=lambda: 100.0,
            door=Door(clock=lambda: 100.0),
            on_change=lambda status: None,
            on_revert=lambda name: None,
        )
        supervisor.begin({"cpu": [EngineSpec(name="m")]})
        await hung.watched.wait()
        await supervisor.stop()
        assert hung.killed.is_set()
        assert supervisor.progresses

    asyncio.run(asyncio.wait_for(main(), 10))
