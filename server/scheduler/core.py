"""The scheduler of one worker: which engine runs next, with which items, and what each step meant for them.

It sees integers and times, never a tensor, a clock or a thread. The worker's loop is

    drain inbox -> offer / cancel -> plan -> engine.launch -> engine.collect (the oldest) -> settle -> send updates

with at most two steps launched and not yet settled, which are settled in the order of their plans.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from engines.protocol import Capacity, StepPlan, StepResult
from server.scheduler.config import SchedulerConfig
from server.scheduler.items import ItemUpdate, StepWork
from server.scheduler.one_shot import OneShotLane
from server.scheduler.sequences import SequenceLane
from server.worker.wire import EngineLoad, Item

__all__ = ["MAX_IN_FLIGHT", "DynamicBatchScheduler", "ItemUpdate", "StepWork"]

MAX_IN_FLIGHT = 2
"""Steps launched and not settled: one runs, the next waits for it on the device."""

Lane = SequenceLane | OneShotLane


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


@dataclass(frozen=True, slots=True)
class _Ticket:
    plan: StepPlan
    work: StepWork
    lane: Lane


class DynamicBatchScheduler:
    """All items of all engines of one worker. One thread calls it; times are seconds of one monotonic clock."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._engines: dict[str, _Engine] = {}
        self._lanes: list[Lane] = []  # the one that was planned longest ago comes first
        self._in_flight: deque[_Ticket] = deque()
        self._step = 0
        self._arrival = 0
        self._settled_work = StepWork()

    @property
    def in_flight(self) -> tuple[StepPlan, ...]:
        """Plans to collect and settle, oldest first."""
        return tuple(ticket.plan for ticket in self._in_flight)

    @property
    def settled_work(self) -> StepWork:
        """Size of the step that was settled last."""
        return self._settled_work

    def add_engine(self, name: str, capacity: Capacity, fingerprint: str) -> None:
        """Serve an engine from now on. Raises ValueError where the name is taken."""
        if name in self._engines:
            raise ValueError(f"engine {name} is here already")
        engine = _Engine(
            SequenceLane(name, capacity, fingerprint, self._config), OneShotLane(name, capacity, self._config)
        )
        self._engines[name] = engine
        self._lanes.extend(engine.lanes)

    def remove_engine(self, name: str) -> list[ItemUpdate]:
        """Forget an engine; its items end with an error. Steps of it in flight must still be settled.

        Raises KeyError for an unknown name.
        """
        engine = self._engines.pop(name)
        self._lanes = [lane for lane in self._lanes if lane not in engine.lanes]
        return [ItemUpdate(item=item, end="error") for lane in engine.lanes for item in lane.drain()]

    def offer(self, items: list[Item], now: float) -> str | None:
        """Take all items of one request, or none. Returns None where they are taken, else why not, for the client."""
        if not items:
            return "the request has no items"
        engine = self._engines.get(items[0].engine)
        if engine is None:
            return f"the model {items[0].engine} is not loaded here"
        lane = engine.lane_of(items[0])
        if any(item.engine != items[0].engine or engine.lane_of(item) is not lane for item in items):
            return "the items of one request must be of one model and one kind"
        if len({item.item for item in items}) < len(items) or any(self._holds(item.item) for item in items):
            return "an item with this id is here already"
        for item in items:
            if reason := lane.refusal(item):
                return reason
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

        ``capacity`` is the engines' present one, by name; only ``graph_rows`` may differ from that of ``add_engine``.
        Engines take turns: of those with something to run, the one planned longest ago is next.
        """
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            return None
        for lane in self._lanes:
            planned = lane.plan(self._step + 1, now, capacity[lane.name])
            if planned is not None:
                plan, work = planned
                self._step += 1
                self._in_flight.append(_Ticket(plan, work, lane))
                self._lanes.remove(lane)
                self._lanes.append(lane)
                return plan
        return None

    def due(self) -> float | None:
        """The time at which ``plan`` may have a step that it does not have now: a one-shot batch ends its wait."""
        return min(
            (due for engine in self._engines.values() if (due := engine.one_shot.due()) is not None), default=None
        )

    def settle(self, result: StepResult, now: float) -> list[ItemUpdate]:
        """Take the result of the oldest step in flight; one update for each item with news.

        The time of the call moves no bound: the step-time model learns from the device's own ``result.seconds``.
        Raises ValueError where the result is none of that step: the engine is broken, and the worker must end.
        """
        if not self._in_flight or self._in_flight[0].plan.step != result.step:
            raise ValueError(f"step {result.step} is not the oldest in flight")
        ticket = self._in_flight.popleft()
        planned = [row.item for row in ticket.plan.rows] + [row.item for row in ticket.plan.one_shot]
        if [row.item for row in result.rows] != planned:
            raise ValueError(f"the result of step {result.step} is not of the rows that were planned")
        self._settled_work = ticket.work
        return ticket.lane.settle(ticket.plan, ticket.work, result)

    def load(self) -> list[EngineLoad]:
        """Gauges of each engine."""
        return [
            msgspec.structs.replace(
                sequences := engine.sequences.load(),
                running=sequences.running + engine.one_shot.running,
                waiting=sequences.waiting + engine.one_shot.waiting,
                integrity_errors=engine.integrity_errors,
            )
            for engine in self._engines.values()
        ]

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
