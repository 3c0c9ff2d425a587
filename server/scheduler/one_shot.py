"""Scheduling of the items of one engine that end after one step: a plain model's rows in a shape bucket.

A step takes the largest batch with which its head is still in time. Heads that cannot be in time are dropped early
where they are firm, so that the batch stays as large as it pays (Nexus, SOSP 2019); the others are served as it goes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field

from engines.protocol import Capacity, OneShotRow, StepPlan, StepResult
from server.scheduler.config import SchedulerConfig
from server.scheduler.deadlines import Aim, aim_of
from server.scheduler.drops import Dropped, overloaded, timed_out
from server.scheduler.items import RANKS, ItemUpdate, StepWork
from server.scheduler.law import Law
from server.scheduler.least_squares import LeastSquares
from server.scheduler.prediction_errors import PredictionErrors
from server.worker.wire import Item

BACKLOG = 2
"""Full batches waiting, above which heads are dropped rather than batches made smaller."""
WARM = 3
"""Steps of a bucket before a prediction is worth anything."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    item: Item
    arrival: int
    offered: float
    aim: Aim

    @property
    def deadline(self) -> float:
        return self.offered - self.item.waited + self.aim.ttft

    @property
    def expires(self) -> float:
        return self.offered - self.item.waited + self.aim.timeout


Entry = tuple[int, float, int, _Waiting]
"""(rank, key, arrival, item): ordered by the first three."""


@dataclass(slots=True)
class _Queue:
    """Items of one shape bucket, and how long steps of it take: a time each step and one each row."""

    entries: list[Entry] = field(default_factory=list)
    ages: dict[int, Entry] = field(default_factory=dict)
    """The same by item, the oldest first."""
    rows: int = 0
    time: LeastSquares = field(default_factory=lambda: LeastSquares(2))
    steps: int = 0

    def push(self, entry: Entry) -> None:
        insort(self.entries, entry)
        self.ages[entry[3].item.item] = entry
        self.rows += entry[3].item.rows

    def remove(self, item: int) -> _Waiting:
        entry = self.ages.pop(item)
        del self.entries[bisect_left(self.entries, entry)]
        self.rows -= entry[3].item.rows
        return entry[3]

    @property
    def head(self) -> _Waiting:
        return self.entries[0][3]

    @property
    def oldest(self) -> _Waiting:
        return next(iter(self.ages.values()))[3]

    def seconds(self, rows: int) -> float:
        """Predicted time of a step; 0 where too little is known."""
        if self.steps < WARM:
            return 0.0
        each, per_row = self.time.weights
        return each + per_row * rows


class OneShotLane:
    """One queue a bucket; a step takes the head of one queue and what fits behind it. Holds no blocks and no slots."""

    def __init__(self, name: str, capacity: Capacity, config: SchedulerConfig, law: Law) -> None:
        self.name = name
        self.decisions: dict[str, int] = {}
        self._capacity = capacity
        self._config = config
        self._law = law
        self._max_rows = min(capacity.max_rows, config.max_batch or capacity.max_rows)
        self._errors = PredictionErrors()
        self._buckets: dict[int, int] = {}  # of each item that is here
        self._queues: dict[int, _Queue] = {}  # by bucket
        self._in_flight: dict[int, float] = {}  # item: seconds that it waited
        self._suspects: list[tuple[Item, float]] = []  # with the time of the offer
        self._dropped: list[Dropped] = []

    def __contains__(self, item: int) -> bool:
        return item in self._buckets

    def reconfigured(self, config: SchedulerConfig, law: Law) -> OneShotLane:
        """An empty lane to go on in this one's place, with other settings and what this one has learned and counted."""
        lane = OneShotLane(self.name, self._capacity, config, law)
        lane.decisions, lane._errors = self.decisions, self._errors
        lane._queues = {bucket: _Queue(time=queue.time, steps=queue.steps) for bucket, queue in self._queues.items()}
        return lane

    @property
    def running(self) -> int:
        return len(self._in_flight)

    @property
    def waiting(self) -> int:
        return len(self._buckets) - len(self._in_flight)

    @property
    def has_suspect(self) -> bool:
        """Somebody waits for a step alone."""
        return bool(self._suspects)

    def refusal(self, item: Item) -> str | None:
        """Why this item can never run here, in words for the client; None where it can."""
        if item.rows > self._max_rows:
            return f"the batch has {item.rows} rows, and a step holds {self._max_rows}"
        return None

    def offer(self, items: list[Item], arrival: int, now: float) -> None:
        """Take items, none of which ``refusal`` refuses, at the places from ``arrival`` on."""
        for index, item in enumerate(items):
            self._buckets[item.item] = item.bucket
            if item.suspect:
                self._suspects.append((item, now))
                continue
            waiting = _Waiting(item, arrival + index, now, aim_of(item, self._config))
            rank = RANKS[item.priority] if self._law.priorities else 0
            key = waiting.deadline if self._law.deadline_order else 0.0
            self._queues.setdefault(item.bucket, _Queue()).push((rank, key, waiting.arrival, waiting))

    def cancel(self, item: int) -> None:
        """Forget an item, if it is here; what a step in flight gives for it is dropped."""
        bucket = self._buckets.pop(item, None)
        if bucket is None or self._in_flight.pop(item, None) is not None:
            return
        if bucket in self._queues and item in self._queues[bucket].ages:
            self._queues[bucket].remove(item)
        else:
            self._suspects = [one for one in self._suspects if one[0].item != item]

    def drain(self) -> list[int]:
        """Forget all items and return their ids."""
        items = list(self._buckets)
        for item in items:
            self.cancel(item)
        return items

    def dropped(self) -> list[Dropped]:
        """Items that ``plan`` dropped since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def due(self) -> float | None:
        """When the first batch that waits for company stops waiting; None where nothing waits."""
        return min((self._ready_at(queue) for queue in self._queues.values() if queue.entries), default=None)

    def plan(self, step: int, now: float, start: float, capacity: Capacity) -> tuple[StepPlan, StepWork] | None:
        """The ready batch whose head comes first: one that cannot grow, or whose head must go now."""
        self._drop_late(now, start)
        ready = []
        for queue in self._queues.values():
            if queue.entries:
                batch, full = self._batch(queue, start)
                if full or now >= self._ready_at(queue):
                    ready.append((queue.entries[0], queue, batch))
        if not ready:
            return None
        _, queue, batch = min(ready, key=lambda one: one[0][:3])
        for one in batch:
            queue.remove(one.item.item)
            self._in_flight[one.item.item] = now - one.offered
        return self._step(step, [one.item for one in batch], queue)

    def plan_alone(self, step: int, now: float, capacity: Capacity) -> tuple[StepPlan, StepWork] | None:
        """A step of the first suspect and of no other item."""
        if not self._suspects:
            return None
        item, offered = self._suspects.pop(0)
        self._in_flight[item.item] = now - offered
        return self._step(step, [item], self._queues.setdefault(item.bucket, _Queue()))

    def _step(self, step: int, items: list[Item], queue: _Queue) -> tuple[StepPlan, StepWork]:
        rows = tuple(OneShotRow(item=item.item, bucket=item.bucket, rows=item.rows) for item in items)
        total = sum(row.rows for row in rows)
        return StepPlan(step=step, engine=self.name, one_shot=rows), StepWork(rows=total, seconds=queue.seconds(total))

    def settle(self, plan: StepPlan, work: StepWork, result: StepResult, now: float) -> list[ItemUpdate]:
        """Each item of the step ends with its output."""
        updates = []
        for row, given in zip(plan.one_shot, result.rows, strict=True):
            waited = self._in_flight.pop(row.item, None)
            if waited is not None:
                del self._buckets[row.item]
                updates.append(ItemUpdate(item=row.item, end="stop", queue_seconds=waited, output=given.output))
        queue = self._queues.get(plan.one_shot[0].bucket)
        if queue is not None and result.seconds > 0 and not result.irregular:
            if work.seconds:
                self._errors.add(work.seconds, result.seconds)
            queue.time.observe((1.0, float(work.rows)), result.seconds)
            queue.steps += 1
        return updates

    # --- deadlines

    def _ready_at(self, queue: _Queue) -> float:
        """A batch waits for company while nobody has waited too long and the head's slack allows it."""
        slack_ends = queue.head.deadline - queue.seconds(queue.rows) * self._errors.safety
        return max(queue.oldest.offered, min(queue.oldest.offered + self._config.max_delay, slack_ends))

    def _batch(self, queue: _Queue, start: float) -> tuple[list[_Waiting], bool]:
        """What one step would take from the queue, and whether it is full: no later arrival could join it.

        As many as fit with which the head is in time, or, where it is late anyway, as many as fit.
        """
        in_time = (queue.head.deadline - start) / self._errors.safety
        bound = self._law.budget == "slack" and queue.seconds(queue.head.item.rows) <= in_time
        batch: list[_Waiting] = []
        rows = 0
        for *_, one in queue.entries:
            more = rows + one.item.rows
            if more > self._max_rows or (bound and queue.seconds(more) > in_time):
                return batch, True
            batch.append(one)
            rows = more
        return batch, rows == self._max_rows

    def _drop_late(self, now: float, start: float) -> None:
        for queue in self._queues.values():
            while queue.entries:
                head = queue.head
                rows = self._max_rows if queue.rows > BACKLOG * self._max_rows else head.item.rows
                takes = queue.seconds(rows) * self._errors.safety
                alone = queue.seconds(head.item.rows) * self._errors.safety
                if head.expires <= now:
                    self._drop(queue, head, timed_out)
                elif self._law.late_drop and head.aim.firm and head.deadline < start + takes and alone < head.aim.ttft:
                    drain = queue.seconds(self._max_rows) * queue.rows / self._max_rows
                    self._drop(queue, head, lambda items, drain=drain: overloaded(items, drain))  # type: ignore[misc]
                else:
                    break

    def _drop(self, queue: _Queue, one: _Waiting, ending: Callable[[list[int]], Dropped]) -> None:
        item = one.item.item
        queue.remove(item)
        del self._buckets[item]
        self._dropped.append(dropped := ending([item]))
        reason = "client's time ran out" if dropped.kind == "timeout" else "dropped late"
        self.decisions[reason] = self.decisions.get(reason, 0) + 1
