"""The scheduler of one worker: which engine runs next, with which items, and what each step meant for them.

It sees integers and times, never a tensor, a clock or a thread. The worker's loop is

    drain inbox -> offer / cancel -> plan -> engine.launch -> engine.collect (the oldest) -> settle -> send updates

with at most two steps launched and not yet settled, which are settled in the order of their plans.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from engines.protocol import Capacity, StepPlan, StepResult, StepSample
from server.scheduler.config import SchedulerConfig
from server.scheduler.draft import Tally
from server.scheduler.drops import Dropped
from server.scheduler.items import ItemUpdate, StepWork
from server.scheduler.law import LAWS, Law
from server.scheduler.one_shot import OneShotLane
from server.scheduler.sequences import SequenceLane
from server.scheduler.step_time import StepTimeModel
from server.worker.wire import EngineLoad, Item

__all__ = ["MAX_IN_FLIGHT", "Dropped", "DynamicBatchScheduler", "ItemUpdate", "StepWork"]

MAX_IN_FLIGHT = 2
"""Steps launched and not settled: one runs, the next waits for it on the device."""

Lane = SequenceLane | OneShotLane


def _finite(item: Item) -> bool:
    """Whether queues can be ordered by what it says: a wire carries NaN like any other number."""
    return all(math.isfinite(each or 0.0) for each in (item.waited, item.weight, item.ttft, item.tpot, item.timeout))


@dataclass(slots=True)
class _Engine:
    sequences: SequenceLane
    one_shot: OneShotLane
    integrity_errors: int = 0

    @property
    def lanes(self) -> tuple[Lane, Lane]:
        return self.sequences, self.one_shot

    def lane_of(self, item: Item) -> Lane:
        return self.one_shot if item.rows else self.sequences

    def load(self) -> EngineLoad:
        """Of both lanes together."""
        load, one_shot = self.sequences.load(), self.one_shot
        p50, p95 = one_shot.errors.quantiles()
        return msgspec.structs.replace(
            load,
            running=load.running + one_shot.running,
            waiting=load.waiting + one_shot.waiting,
            predicted_wait=load.predicted_wait + one_shot.predicted_wait,
            decisions=Counter(load.decisions) + Counter(one_shot.decisions),
            integrity_errors=self.integrity_errors,
            step_error_p50=max(load.step_error_p50, p50),
            step_error_p95=max(load.step_error_p95, p95),
        )


@dataclass(slots=True)
class _Ticket:
    plan: StepPlan
    work: StepWork
    lane: Lane
    began: float
    """When the device should have begun it."""
    alone: bool = False

    def remaining(self, now: float) -> float:
        """Seconds that the device still works on it, as predicted. Bounded, whatever the clock does."""
        return min(max(self.began + self.work.seconds - now, 0.0), self.work.seconds)


class DynamicBatchScheduler:
    """All items of all engines of one worker. One thread calls it; times are seconds of one monotonic clock."""

    def __init__(self, config: SchedulerConfig, law: Law | None = None) -> None:
        """``law`` says which rules hold, one by one; by default those of ``config.policy``."""
        self._config = config
        self._law = law or LAWS[config.policy]
        self._engines: dict[str, _Engine] = {}
        self._lanes: list[Lane] = []  # the one that was planned longest ago comes first
        self._in_flight: deque[_Ticket] = deque()
        self._step = 0
        self._arrival = 0
        self._settled_work = StepWork()
        self._suspect_next = True
        self._planned_at = 0.0
        self._unheard = 0.0
        self._dropped: list[Dropped] = []

    @property
    def in_flight(self) -> tuple[StepPlan, ...]:
        """Plans to collect and settle, oldest first."""
        return tuple(ticket.plan for ticket in self._in_flight)

    @property
    def settled_work(self) -> StepWork:
        """Size of the step that was settled last, and what it was predicted to take."""
        return self._settled_work

    def add_engine(self, name: str, capacity: Capacity, fingerprint: str, profile: Sequence[StepSample] = ()) -> None:
        """Serve an engine from now on; ``profile`` is what it measured at load. Raises ValueError for a name in use."""
        if name in self._engines:
            raise ValueError(f"engine {name} is here already")
        step_time = StepTimeModel()
        step_time.seed([sample for sample in profile if sample.bucket is None])
        engine = _Engine(
            SequenceLane(name, capacity, fingerprint, self._config, self._law, step_time, Tally()),
            OneShotLane(name, capacity, self._config, self._law),
        )
        engine.one_shot.seed(profile)
        self._engines[name] = engine
        self._lanes.extend(engine.lanes)

    def configure(self, config: SchedulerConfig) -> None:
        """Go on with other settings and the law of their policy, without items: all are forgotten.

        What was learned and counted stays.

        Raises ValueError while steps are in flight.
        """
        if self._in_flight:
            raise ValueError("settings cannot change while steps are in flight")
        self._config, self._law = config, LAWS[config.policy]
        self._dropped, self._unheard = [], 0.0
        for engine in self._engines.values():
            engine.sequences = engine.sequences.reconfigured(config, self._law)
            engine.one_shot = engine.one_shot.reconfigured(config, self._law)
        self._lanes = [lane for engine in self._engines.values() for lane in engine.lanes]

    def remove_engine(self, name: str) -> list[ItemUpdate]:
        """Forget an engine; its items end with an error. Steps of it in flight must still be settled.

        Raises KeyError for an unknown name.
        """
        engine = self._engines.pop(name)
        self._dropped += [dropped for lane in engine.lanes for dropped in lane.dropped()]
        self._lanes = [lane for lane in self._lanes if lane not in engine.lanes]
        return [ItemUpdate(item=item, end="error") for lane in engine.lanes for item in lane.drain()]

    def offer(self, items: list[Item], now: float) -> str | None:
        """Take all items of one request, or none. Returns None where they are taken, else why not, for the client.

        After a settle, the loop was deaf while it waited for the step: an item that is offered then counts as having
        come when that began, or its deadline would be up to a step too late.
        """
        if not items:
            return "the request has no items"
        engine = self._engines.get(items[0].engine)
        if engine is None:
            return f"the model {items[0].engine} is not loaded here"
        lane = engine.lane_of(items[0])
        if any(item.engine != items[0].engine or engine.lane_of(item) is not lane for item in items):
            return "the items of one request must be of one model and one kind"
        if any(not _finite(item) for item in items):
            return "its targets, its timeout and its tenant's weight must be finite numbers"
        if len({item.item for item in items}) < len(items) or any(self._holds(item.item) for item in items):
            return "an item with this id is here already"
        for item in items:
            if reason := lane.refusal(item):
                return reason
        if self._unheard:
            items = [msgspec.structs.replace(item, waited=item.waited + self._unheard) for item in items]
        lane.offer(items, self._arrival, now)
        self._arrival += len(items)
        return None

    def cancel(self, items: Iterable[int]) -> None:
        """Forget these items and take their blocks back at once; no update of them follows. Unknown ids are ignored."""
        for item in items:
            for lane in self._lanes:
                lane.cancel(item)

    def plan(self, now: float, capacity: Mapping[str, Capacity]) -> StepPlan | None:
        """The next step to launch, or None: two are in flight, or nothing can run before a settle, an offer or ``due``.

        ``capacity`` is the engines' present one, by name; only its graphs may differ from those of ``add_engine``.
        Engines take turns: of those with something to run, the one planned longest ago is next.
        """
        self._planned_at, self._unheard = now, 0.0
        if len(self._in_flight) >= MAX_IN_FLIGHT or any(ticket.alone for ticket in self._in_flight):
            return None
        suspects = [lane for lane in self._lanes if lane.has_suspect]
        if suspects and self._suspect_next:
            # It must be alone on the device, so that a death in its step tells something: what is there ends first.
            return None if self._in_flight else self._plan_suspect(suspects, now, capacity) or self._plan(now, capacity)
        self._suspect_next = True
        plan = self._plan(now, capacity)
        if plan is None and suspects and not self._in_flight:
            return self._plan_suspect(suspects, now, capacity)
        return plan

    def _plan(self, now: float, capacity: Mapping[str, Capacity]) -> StepPlan | None:
        start = now + sum(ticket.remaining(now) for ticket in self._in_flight)
        for lane in self._lanes:
            planned = lane.plan(self._step + 1, now, start, capacity[lane.name])
            if planned is not None:
                return self._file(_Ticket(*planned, lane, start))
        return None

    def _plan_suspect(self, lanes: list[Lane], now: float, capacity: Mapping[str, Capacity]) -> StepPlan | None:
        """Suspects and others take turns."""
        self._suspect_next = False
        for lane in lanes:
            planned = lane.plan_alone(self._step + 1, now, capacity[lane.name])
            if planned is not None:
                return self._file(_Ticket(*planned, lane, now, alone=True))
        return None

    def _file(self, ticket: _Ticket) -> StepPlan:
        self._step += 1
        self._in_flight.append(ticket)
        self._lanes.remove(ticket.lane)
        self._lanes.append(ticket.lane)
        return ticket.plan

    def dropped(self) -> list[Dropped]:
        """Requests that ``plan`` dropped since the last call: too late for their target, or for their client."""
        dropped, self._dropped = self._dropped, []
        for lane in self._lanes:
            dropped += lane.dropped()
        return dropped

    def due(self) -> float | None:
        """The time at which ``plan`` may have a step that it does not have now: a one-shot batch ends its wait."""
        return min(
            (due for engine in self._engines.values() if (due := engine.one_shot.due()) is not None), default=None
        )

    def settle(self, result: StepResult, now: float) -> list[ItemUpdate]:
        """Take the result of the oldest step in flight; one update for each item with news.

        ``now`` paces the streams; the step-time model learns from the device's own ``result.seconds``.
        Raises ValueError where the result is none of that step: the engine is broken, and the worker must end.
        """
        if not self._in_flight or self._in_flight[0].plan.step != result.step:
            raise ValueError(f"step {result.step} is not the oldest in flight")
        ticket = self._in_flight.popleft()
        planned = [row.item for row in ticket.plan.rows] + [row.item for row in ticket.plan.one_shot]
        if [row.item for row in result.rows] != planned:
            raise ValueError(f"the result of step {result.step} is not of the rows that were planned")
        self._settled_work = ticket.work
        # Bounded, whatever the clock does.
        self._unheard = min(max(now - self._planned_at, 0.0), 2 * ticket.work.seconds)
        if self._in_flight:
            self._in_flight[0].began = now
        return ticket.lane.settle(ticket.plan, ticket.work, result, now)

    def load(self) -> list[EngineLoad]:
        """Gauges of each engine."""
        return [engine.load() for engine in self._engines.values()]

    def integrity(self) -> list[str]:
        """Recount all that is counted; one text for each contradiction, none when all is well. Takes milliseconds."""
        texts = []
        for name, engine in self._engines.items():
            plans = [ticket.plan for ticket in self._in_flight if ticket.lane is engine.sequences]
            errors = engine.sequences.integrity(plans)
            engine.integrity_errors += len(errors)
            texts += [f"{name}: {error}" for error in errors]
        return texts

    def _holds(self, item: int) -> bool:
        return any(item in lane for lane in self._lanes)
