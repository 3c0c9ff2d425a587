"""The first of the two gates: what may wait in front of a worker. The worker's ``offer`` is the second, and final."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from server.errors import EngineUnavailable, Overloaded
from server.requests import Request
from server.worker.wire import EngineLoad, StepStats

_SMOOTHING = 0.1
"""Weight of the newest step in the measured rate."""
_LONGEST_RETRY_AFTER = 60.0


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds for each engine."""

    max_queue: int = 2048
    """Most choices running and waiting."""
    max_waiting_tokens: int = 1 << 20
    """Most prompt tokens that wait for their first step. A single request is let in however long it is."""
    max_wait: float = 120.0
    """Seconds of predicted wait beyond which a request is refused."""


@dataclass(slots=True)
class _Lane:
    """What the door knows of one engine."""

    shut: str = ""
    """Why nothing is let in; empty while the engine is ready."""
    waiting: dict[int, int] = field(default_factory=dict)
    """Prompt tokens by request that has no output token yet."""
    choices: dict[int, int] = field(default_factory=dict)
    """Choices by request that has not ended."""
    reported_tokens: int = 0
    """Waiting tokens in the worker's last report: those of preempted items are known only there."""
    tokens_per_second: float = 0.0
    """Computed tokens by device time; 0 before the first step."""

    @property
    def waiting_tokens(self) -> int:
        return max(sum(self.waiting.values()), self.reported_tokens)

    @property
    def drain_seconds(self) -> float:
        """Predicted time until what waits now has been computed."""
        return self.waiting_tokens / self.tokens_per_second if self.tokens_per_second else 0.0


class Door:
    """Lets requests in or refuses them, from its own count of open requests and the worker's reports.

    A request counts as waiting from ``filed`` to ``started`` and takes room until ``ended``; so work that the worker
    has not seen yet is counted like the rest.
    """

    def __init__(self, limits: AdmissionLimits | None = None) -> None:
        self._limits = limits or AdmissionLimits()
        self._lanes: dict[str, _Lane] = {}

    def open(self, engine: str) -> None:
        """The engine is ready for requests."""
        self._lane(engine).shut = ""

    def shut(self, engine: str, reason: str) -> None:
        """Refuse all that comes, saying why: loading, restarting, failed, shutting down. Clears the worker's report."""
        lane = self._lane(engine)
        lane.shut = reason
        lane.reported_tokens = 0

    def check(self, request: Request) -> None:
        """Raise EngineUnavailable or Overloaded, both with ``retry_after``, when the request cannot be let in."""
        lane = self._lane(request.model)
        if lane.shut:
            raise EngineUnavailable(f"The model {request.model} is not available: {lane.shut}.", retry_after=5.0)
        if sum(lane.choices.values()) + len(request.sampling) > self._limits.max_queue:
            raise self._overloaded(lane, "too many requests are open")
        if lane.waiting and lane.waiting_tokens + len(request.prompt) > self._limits.max_waiting_tokens:
            raise self._overloaded(lane, "too many prompt tokens are waiting")
        if lane.drain_seconds > self._limits.max_wait:
            raise self._overloaded(lane, f"the predicted wait is {lane.drain_seconds:.0f} s")

    def filed(self, request: Request) -> None:
        """The request was sent to the worker."""
        lane = self._lane(request.model)
        lane.waiting[request.id] = len(request.prompt)
        lane.choices[request.id] = len(request.sampling)

    def started(self, request: Request) -> None:
        """Its first output token came. Idempotent."""
        self._lane(request.model).waiting.pop(request.id, None)

    def ended(self, request: Request) -> None:
        """It is over, however it ended. Idempotent."""
        lane = self._lane(request.model)
        lane.waiting.pop(request.id, None)
        lane.choices.pop(request.id, None)

    def reported(self, load: EngineLoad) -> None:
        """The worker's gauges arrived."""
        self._lane(load.name).reported_tokens = load.waiting_tokens

    def stepped(self, engine: str, stats: StepStats) -> None:
        """A step was settled: measures how fast the engine computes tokens."""
        if stats.seconds <= 0 or not stats.tokens:
            return
        lane = self._lane(engine)
        rate = stats.tokens / stats.seconds
        previous = lane.tokens_per_second or rate
        lane.tokens_per_second = previous + _SMOOTHING * (rate - previous)

    def _lane(self, engine: str) -> _Lane:
        return self._lanes.setdefault(engine, _Lane())

    def _overloaded(self, lane: _Lane, reason: str) -> Overloaded:
        wait = min(max(math.ceil(lane.drain_seconds), 1.0), _LONGEST_RETRY_AFTER)
        return Overloaded(f"The server is overloaded: {reason}. Try again later.", retry_after=wait)
