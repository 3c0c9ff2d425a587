"""What the door knows of one engine: the requests that wait for it, the room they take, and the workers' reports."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from server.requests import Request
from server.scheduler.deadlines import SOFT_PROMPT_RATE, SOFT_TTFT
from server.worker.wire import EngineLoad, Priority

_RANK: dict[Priority, int] = {"high": 0, "normal": 1, "low": 2}


def patience(request: Request) -> float:
    """Seconds from arrival in which the first token is worth something; infinite without a firm target or timeout."""
    firm = request.ttft if request.firm else None
    return min((each for each in (firm, request.timeout) if each is not None), default=math.inf)


def deadline(request: Request) -> float:
    """Of the first token, as the scheduler orders the requests of a class."""
    soft = max(SOFT_TTFT, len(request.prompt) / SOFT_PROMPT_RATE)
    return request.arrived + (soft if request.ttft is None else request.ttft)


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker said last, and when it came."""

    load: EngineLoad
    at: float


@dataclass(slots=True)
class Held:
    """What one tenant has in a lane. The nameless one is not counted: it is everybody."""

    choices: int = 0
    waiting_tokens: int = 0


@dataclass(slots=True)
class _Queue:
    """Requests of one tenant and class that have no output token yet."""

    weight: float
    tokens: int = 0
    waiting: dict[int, tuple[float, int]] = field(default_factory=dict)
    """Deadline and prompt tokens by request."""


@dataclass(slots=True)
class Lane:
    shut: str = ""
    """Why nothing is let in; empty while requests are taken."""
    waiting_tokens: int = 0
    open_choices: int = 0
    input_bytes: int = 0
    """Of tensors of requests that have not ended."""
    reports: dict[int, Report] = field(default_factory=dict)
    """By worker that serves the engine."""
    refusing: set[Priority] = field(default_factory=set)
    """Classes of which a request was refused because of its target, and none was let in since."""
    _waiting: dict[int, tuple[float, int]] = field(default_factory=dict)
    """When a request was filed, and its prompt tokens; in this order."""
    _queues: dict[tuple[int, str], _Queue] = field(default_factory=dict)
    """By class and tenant; none is empty."""
    _choices: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Choices and bytes of tensors, by request that has not ended."""
    _held: dict[str, Held] = field(default_factory=dict)

    @property
    def known_tokens(self) -> int:
        """Waiting tokens. Those of preempted items are in the reports alone."""
        return max(self.waiting_tokens, sum(report.load.waiting_tokens for report in self.reports.values()))

    @property
    def prompt_token_seconds(self) -> float:
        """What one prompt token costs the worker that computes it; 0 while nothing is known."""
        known = [report.load.prompt_token_seconds for report in self.reports.values()]
        return sum(known) / len(known) if known else 0.0

    def held(self, tenant: str) -> Held:
        return self._held.get(tenant) or Held()

    def backlog(self, now: float) -> float:
        """Predicted seconds until all that waits now has been given its first step; 0 where nothing is open."""
        reports = self.reports.values()
        if not reports or not self.open_choices:
            return 0.0
        told = sum(max(0.0, report.load.predicted_wait - max(0.0, now - report.at)) for report in reports)
        seen = min(report.at for report in reports)
        unseen = 0
        for filed, tokens in reversed(self._waiting.values()):
            if filed < seen:
                break
            unseen += tokens
        return (told + unseen * self.prompt_token_seconds) / len(reports)

    def ahead(self, request: Request) -> float:
        """Share of the waiting tokens that will be computed before this request; 1 where nothing waits.

        Higher classes go first. Inside the class earlier deadlines do, but another tenant only until it has had what
        its weight gives it beside this one.
        """
        if not self.waiting_tokens:
            return 1.0
        rank, due = _RANK[request.priority], deadline(request)
        mine = self._queues.get((rank, request.tenant))
        own = 0 if mine is None else sum(tokens for each, tokens in mine.waiting.values() if each <= due)
        entitled = (own + len(request.prompt)) / request.weight
        before = float(own)
        for (other_rank, tenant), queue in self._queues.items():
            if other_rank < rank:
                before += queue.tokens
            elif other_rank == rank and tenant != request.tenant:
                before += min(queue.tokens, entitled * queue.weight)
        return min(1.0, before / self.waiting_tokens)

    def filed(self, request: Request, now: float) -> None:
        self.ended(request)
        tokens, choices = len(request.prompt), len(request.sampling)
        self._waiting[request.id] = now, tokens
        self.waiting_tokens += tokens
        queue = self._queues.setdefault((_RANK[request.priority], request.tenant), _Queue(request.weight))
        queue.waiting[request.id] = deadline(request), tokens
        queue.tokens += tokens
        self._choices[request.id] = choices, len(request.inputs)
        self.open_choices += choices
        self.input_bytes += len(request.inputs)
        if request.tenant:
            held = self._held.setdefault(request.tenant, Held())
            held.choices += choices
            held.waiting_tokens += tokens

    def started(self, request: Request) -> None:
        """Idempotent, like ``ended``."""
        waiting = self._waiting.pop(request.id, None)
        if waiting is None:
            return
        _, tokens = waiting
        self.waiting_tokens -= tokens
        key = _RANK[request.priority], request.tenant
        queue = self._queues[key]
        del queue.waiting[request.id]
        queue.tokens -= tokens
        if not queue.waiting:
            del self._queues[key]
        if request.tenant:
            self._held[request.tenant].waiting_tokens -= tokens

    def ended(self, request: Request) -> None:
        self.started(request)
        choices, input_bytes = self._choices.pop(request.id, (0, 0))
        self.open_choices -= choices
        self.input_bytes -= input_bytes
        held = self._held.get(request.tenant)
        if held is not None:
            held.choices -= choices
            if not held.choices:
                del self._held[request.tenant]
