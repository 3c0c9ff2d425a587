"""The first of the two gates: what may wait in front of a worker. The worker's ``offer`` is the second, and final."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from server.errors import EngineUnavailable, InvalidRequest, Overloaded, QueueTimeout, SlimserveError
from server.lane import Lane, Report, patience
from server.requests import Request
from server.worker.wire import EngineLoad, Refused

RETRY_AFTER = 1.0, 30.0
"""Shortest and longest, in seconds."""
_JITTER = 0.2
"""Retry-After is spread by this share to both sides, so that what was refused together does not return together."""
_REOPEN = 0.8
"""A class that refuses goes on until a prediction is below this share of what it refuses at."""
_CLEAR = 2.0
"""A prediction must be this many times the target to refuse at the door. It knows neither the prefixes that will be
found nor the requests ahead that will be dropped, and who is let in wrongly costs nothing: the scheduler drops it late,
when it is sure, before its first step. In the simulator's mix a door that refuses at once loses 2 % of the goodput."""
_SHARE = 4
"""A tenant takes at most this many times what is left free: alone it gets 4/5 of the room, and no two get it all.
Dynamic thresholds of Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds for each engine."""

    max_queue: int = 2048
    """Most choices running and waiting."""
    max_waiting_tokens: int = 1 << 20
    """Most prompt tokens that wait for their first step. A single request is let in however long it is."""
    max_input_bytes: int = 1 << 30
    """Most bytes of tensors of plain models' requests that have not ended. A single request is let in all the same."""
    max_wait: float = 120.0
    """Seconds of predicted wait beyond which a request is refused."""


class Door:
    """Lets requests in or refuses them, from its own count of open requests and the workers' reports.

    A request counts as waiting from ``filed`` to ``started`` and takes room until ``ended``; so work that the worker
    has not seen yet is counted like the rest. One whose firm target, or whose client's patience, is clearly shorter
    than its predicted time to first token is refused at once, unless an idle machine would miss it too: then the target
    is at fault and the request is served as well as can be. The worker has the last word.
    """

    def __init__(
        self,
        limits: AdmissionLimits | None = None,
        *,
        clock: Callable[[], float],
        chance: Callable[[], float] = random.random,
    ) -> None:
        """``clock`` is that of ``Request.arrived``; ``chance`` gives numbers from 0 to 1."""
        self.limits = limits or AdmissionLimits()
        """May be replaced at any time."""
        self._clock = clock
        self._chance = chance
        self._lanes: dict[str, Lane] = {}

    def open(self, engine: str) -> None:
        """Requests for the engine are taken."""
        self._lane(engine).shut = ""

    def shut(self, engine: str, reason: str) -> None:
        """Refuse all that comes, saying why: loading, failed, shutting down. Clears the workers' reports."""
        lane = self._lane(engine)
        lane.shut = reason
        lane.reports.clear()

    def lost(self, engine: str, worker: int) -> None:
        """What this worker reported holds no more."""
        self._lane(engine).reports.pop(worker, None)

    def check(self, request: Request) -> None:
        """Raise EngineUnavailable or Overloaded, both with ``retry_after``, when the request cannot be let in."""
        lane = self._lane(request.model)
        if lane.shut:
            raise EngineUnavailable(f"The model {request.model} is not available: {lane.shut}.", retry_after=5.0)
        now = self._clock()
        backlog = lane.backlog(now)
        if (full := self._full(lane, request)) is not None:
            raise self._overloaded(*full, backlog, backlog)
        alone = max(0.0, now - request.arrived) + len(request.prompt) * lane.prompt_token_seconds
        if backlog > self.limits.max_wait or backlog + alone > patience(request) * _CLEAR * _REOPEN:
            self._check_wait(lane, request, backlog * lane.ahead(request), alone)
        else:
            lane.refusing.discard(request.priority)

    def _full(self, lane: Lane, request: Request) -> tuple[str, str] | None:
        """Why there is no room, for the client and for the counter."""
        choices, tokens = len(request.sampling), len(request.prompt)
        free_choices = self.limits.max_queue - lane.open_choices
        free_tokens = self.limits.max_waiting_tokens - lane.known_tokens
        if choices > free_choices:
            return "too many requests are open", "queue_full"
        if lane.waiting_tokens and tokens > free_tokens:
            return "too many prompt tokens are waiting", "tokens_waiting"
        if lane.input_bytes and lane.input_bytes + len(request.inputs) > self.limits.max_input_bytes:
            return "too many bytes of tensors are waiting", "queue_full"
        held = lane.held(request.tenant)
        if held.choices and held.choices + choices > free_choices * _SHARE:
            return "too many requests of this tenant are open", "tenant_share"
        if held.waiting_tokens and held.waiting_tokens + tokens > free_tokens * _SHARE:
            return "too many prompt tokens of this tenant are waiting", "tenant_share"
        return None

    def _check_wait(self, lane: Lane, request: Request, queue: float, alone: float) -> None:
        """``queue`` is the predicted wait, ``alone`` the time to the first token without any."""
        if queue > self.limits.max_wait:
            raise self._overloaded(f"the predicted wait is {queue:.0f} s", "predicted_wait", queue, queue)
        target, predicted = patience(request), queue + alone
        clear = target * _CLEAR
        allowed = clear * _REOPEN if request.priority in lane.refusing else clear
        if predicted <= allowed or alone > target:
            lane.refusing.discard(request.priority)
            return
        lane.refusing.add(request.priority)
        reason = f"the first token is predicted after {predicted:.1f} s, and wanted within {target:.1f} s"
        raise self._overloaded(reason, "target", queue, predicted - clear * _REOPEN, predicted)

    def filed(self, request: Request) -> None:
        """The request was sent to a worker."""
        self._lane(request.model).filed(request, self._clock())

    def started(self, request: Request) -> None:
        """Its first output token came. Idempotent."""
        self._lane(request.model).started(request)

    def ended(self, request: Request) -> None:
        """It is over, however it ended. Idempotent."""
        self._lane(request.model).ended(request)

    def reported(self, load: EngineLoad, worker: int = 0) -> None:
        """A worker's gauges arrived."""
        self._lane(load.name).reports[worker] = Report(load, self._clock())

    def refusal(self, refused: Refused) -> SlimserveError:
        """What the client reads where the worker refused."""
        match refused.kind:
            case "invalid":
                return InvalidRequest(f"The model cannot take this request: {refused.reason}", reason="invalid")
            case "timeout":
                return QueueTimeout("The time that the client waits ran out before the first token.")
            case "overload":
                return self._overloaded(
                    "the first token cannot come in time", "late", refused.retry_after, refused.retry_after
                )

    def _lane(self, engine: str) -> Lane:
        return self._lanes.setdefault(engine, Lane())

    def _overloaded(
        self, why: str, reason: str, queue: float, drain: float, predicted_ttft: float | None = None
    ) -> Overloaded:
        shortest, longest = RETRY_AFTER
        spread = 1 + _JITTER * (2 * self._chance() - 1)
        return Overloaded(
            f"The server is overloaded: {why}. Try again later.",
            reason=reason,
            queue_seconds=queue,
            predicted_ttft=predicted_ttft,
            retry_after=min(max(min(drain, longest) * spread, shortest), longest),
        )
