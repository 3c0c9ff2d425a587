"""What stands before the scheduler: the server's own door, or a plain bound on the queue."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.simulation.workload import SimulatedRequest
from engines.protocol import SamplingParams
from server.admission import Door
from server.errors import Overloaded
from server.requests import Request
from server.worker.wire import EngineLoad

REPORT_EVERY = 0.5
"""Seconds between the worker's load reports."""


class QueueCap:
    """Refuses while so many requests have no first token yet; 0 refuses none."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: set[int] = set()

    def admits(self, request: SimulatedRequest) -> bool:
        if self._most and len(self._waiting) >= self._most:
            return False
        self._waiting.add(request.number)
        return True

    def started(self, request: SimulatedRequest) -> None:
        self._waiting.discard(request.number)

    def ended(self, request: SimulatedRequest) -> None:
        self._waiting.discard(request.number)

    def report(self, now: float, load: Callable[[], EngineLoad]) -> None:
        """It asks nobody."""


class ServerDoor:
    """The door of the API process, which hears from the worker twice a second."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._now = 0.0
        self._next_report = 0.0
        self._door = Door(clock=lambda: self._now, chance=lambda: 0.5)
        self._open: dict[int, Request] = {}

    def admits(self, request: SimulatedRequest) -> bool:
        asked = Request(
            id=request.number,
            model=self._model,
            prompt=[0] * request.prompt,
            max_tokens=request.output,
            sampling=(SamplingParams(seed=0),),
            arrived=request.arrival,
            priority=request.priority,
            tenant=request.tenant,
            ttft=request.targets.first_token(request.prompt),
            tpot=request.targets.tpot,
            firm=True,
        )
        try:
            self._door.check(asked)
        except Overloaded:
            return False
        self._door.filed(asked)
        self._open[request.number] = asked
        return True

    def started(self, request: SimulatedRequest) -> None:
        self._door.started(self._open[request.number])

    def ended(self, request: SimulatedRequest) -> None:
        self._door.ended(self._open.pop(request.number))

    def report(self, now: float, load: Callable[[], EngineLoad]) -> None:
        """Sets the door's clock, and passes the worker's gauges on when a report is due."""
        self._now = now
        if now >= self._next_report:
            self._next_report = now + REPORT_EVERY
            self._door.reported(load())
