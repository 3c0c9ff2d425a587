"""One run: the server's own scheduler on a clock that jumps from event to event, before a device that only counts."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.simulation.coefficients import Coefficients, shape_of
from benchmarks.simulation.gate import QueueCap, ServerDoor
from benchmarks.simulation.policies import Policy
from benchmarks.simulation.workload import OTHER_TOKEN, STOP_TOKEN, SimulatedRequest
from engines.protocol import RowResult, StepPlan, StepResult
from server.scheduler.core import MAX_IN_FLIGHT, DynamicBatchScheduler
from server.worker.wire import EngineLoad

ENGINE = "m"


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times in seconds of the run's clock."""

    request: SimulatedRequest
    refused: bool = False
    """At the door, or dropped before its first token."""
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    longest_gap: float = 0.0

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.request.arrival

    @property
    def tpot(self) -> float:
        """Mean gap; 0 for a single token."""
        return 0.0 if self.first is None or self.tokens < 2 else (self.last - self.first) / (self.tokens - 1)

    @property
    def met_ttft(self) -> bool:
        ttft = self.ttft
        return ttft is not None and ttft <= self.request.targets.first_token(self.request.prompt)

    @property
    def met(self) -> bool:
        """All targets; a request that was refused met none."""
        return self.met_ttft and self.tpot <= self.request.targets.tpot

    def heard(self, tokens: int, now: float) -> None:
        if self.first is None:
            self.first = now
        else:
            self.longest_gap = max(self.longest_gap, now - self.last)
        self.last = now
        self.tokens += tokens


@dataclass(slots=True)
class RunResult:
    outcomes: list[Outcome]
    load: EngineLoad
    """Gauges and counters at the end."""
    seconds: float
    """Of the run's clock, until the last token."""
    busy: float
    """Seconds in which the device worked."""
    steps: int
    plan_seconds: list[float] = field(default_factory=list)
    """Of this process, one a call of ``plan``."""


class SimulatedDevice:
    """Runs steps one after the other; how long they take comes from coefficients, what they draw from the requests."""

    def __init__(self, coefficients: Coefficients, requests: Sequence[SimulatedRequest], seed: int) -> None:
        self._coefficients = coefficients
        self._last_position = {request.number: request.prompt + request.output - 1 for request in requests}
        self._random = random.Random(seed)
        self._free_at = 0.0
        self._in_flight: deque[tuple[StepPlan, float, float]] = deque()
        self.busy = 0.0

    def __len__(self) -> int:
        """Steps launched and not collected."""
        return len(self._in_flight)

    def launch(self, plan: StepPlan, now: float) -> None:
        """The step runs when the one before it has ended, after the gap that the host leaves."""
        seconds = self._coefficients.drawn(shape_of(plan), self._random.random())
        self._free_at = max(self._free_at, now) + self._coefficients.gap + seconds
        self._in_flight.append((plan, seconds, self._free_at))
        self.busy += seconds

    def collect(self) -> tuple[StepResult, float]:
        """Result of the oldest step, and when it is there."""
        plan, seconds, end = self._in_flight.popleft()
        rows = [
            RowResult(item=row.item, tokens=[self._token(row.item, row.start + row.count)] if row.max_new else [])
            for row in plan.rows
        ]
        return StepResult(step=plan.step, rows=rows, seconds=seconds), end

    def _token(self, item: int, position: int) -> int:
        return STOP_TOKEN if position == self._last_position[item] else OTHER_TOKEN


class Simulation:
    """The worker's loop, with a simulated device and clock. Arrivals wait while the loop waits for a step."""

    def __init__(
        self,
        policy: Policy,
        coefficients: Coefficients,
        requests: Sequence[SimulatedRequest],
        *,
        max_output: int | None,
        seed: int,
    ) -> None:
        """``requests`` in the order of arrival, each with ``max_output`` as its limit, or its own end with None."""
        self._policy = policy
        self._capacity = {ENGINE: coefficients.capacity}
        self._scheduler: DynamicBatchScheduler = policy.scheduler()
        self._scheduler.add_engine(ENGINE, coefficients.capacity, "simulated")
        self._host = coefficients.host
        self._device = SimulatedDevice(coefficients, requests, seed)
        self._max_output = max_output
        self._arriving = deque(Outcome(request) for request in requests)
        self._outcomes = {outcome.request.number: outcome for outcome in self._arriving}
        self._gate = ServerDoor(ENGINE) if policy.door else QueueCap(policy.queue_cap)
        self._now = 0.0
        self._steps = 0
        self._plan_seconds: list[float] = []

    def run(self) -> RunResult:
        """Until every request has its ending."""
        while self._turn():
            pass
        return RunResult(
            outcomes=list(self._outcomes.values()),
            load=self._load(),
            seconds=self._now,
            busy=self._device.busy,
            steps=self._steps,
            plan_seconds=self._plan_seconds,
        )

    def _turn(self) -> bool:
        """One round of the loop; False where nothing is left to do."""
        self._gate.report(self._now, self._load)
        while self._arriving and self._arriving[0].request.arrival <= self._now:
            self._offer(self._arriving.popleft())
        began = time.perf_counter()
        plan = self._scheduler.plan(self._now, self._capacity)
        self._plan_seconds.append(time.perf_counter() - began)
        self._hear_dropped()
        if plan is not None:
            self._device.launch(plan, self._now)
        if self._device and (plan is None or len(self._device) == MAX_IN_FLIGHT):
            self._settle_oldest()
            return True
        return plan is not None or self._sleep()

    def _sleep(self) -> bool:
        """Jump to the next time at which something can happen."""
        moments = [self._arriving[0].request.arrival] if self._arriving else []
        if (due := self._scheduler.due()) is not None:
            moments.append(due)
        if not moments:
            return False
        self._now = max(self._now, min(moments))
        return True

    def _load(self) -> EngineLoad:
        return self._scheduler.load()[0]

    def _offer(self, outcome: Outcome) -> None:
        if not self._gate.admits(outcome.request):
            outcome.refused = True
            return
        item = outcome.request.item(self._max_output, self._policy.aims)
        refusal = self._scheduler.offer([item], self._now)
        if refusal is not None:
            raise ValueError(f"request {item.item} can never run: {refusal}")

    def _hear_dropped(self) -> None:
        for item in (item for dropped in self._scheduler.dropped() for item in dropped.items):
            outcome = self._outcomes[item]
            outcome.refused = True
            self._gate.ended(outcome.request)

    def _settle_oldest(self) -> None:
        result, end = self._device.collect()
        self._now = max(self._now, end)
        self._steps += 1
        updates = self._scheduler.settle(result, self._now)
        # What a step costs the loop is spent here, all at once: its outputs leave after it, and so does the next plan.
        self._now += self._host.seconds(len(result.rows))
        for update in updates:
            outcome = self._outcomes[update.item]
            if update.tokens:
                if outcome.first is None:
                    self._gate.started(outcome.request)
                outcome.heard(len(update.tokens), self._now)
            if update.end:
                self._gate.ended(outcome.request)
