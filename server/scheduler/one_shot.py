"""Scheduling of the items of one engine that end after one step: a plain model's rows in a shape bucket."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engines.protocol import Capacity, OneShotRow, StepPlan, StepResult
from server.scheduler.config import SchedulerConfig
from server.scheduler.items import ItemUpdate, StepWork
from server.worker.wire import Item


@dataclass(frozen=True, slots=True)
class _Waiting:
    item: Item
    arrival: int
    offered: float


class OneShotLane:
    """One queue a bucket; a step takes the head of one queue and what fits behind it. Holds no blocks and no slots."""

    def __init__(self, name: str, capacity: Capacity, config: SchedulerConfig) -> None:
        self.name = name
        self._max_rows = min(capacity.max_rows, config.max_batch or capacity.max_rows)
        self._max_delay = config.max_delay
        self._buckets: dict[int, int] = {}  # of each item that is here
        self._queues: dict[int, deque[_Waiting]] = {}  # by bucket, none of them empty
        self._in_flight: dict[int, float] = {}  # item: seconds that it waited

    def __contains__(self, item: int) -> bool:
        return item in self._buckets

    @property
    def running(self) -> int:
        return len(self._in_flight)

    @property
    def waiting(self) -> int:
        return len(self._buckets) - len(self._in_flight)

    def refusal(self, item: Item) -> str | None:
        """Why this item can never run here, in words for the client; None where it can."""
        if item.rows > self._max_rows:
            return f"the batch has {item.rows} rows, and a step holds {self._max_rows}"
        return None

    def offer(self, items: list[Item], arrival: int, now: float) -> None:
        """Take items, none of which ``refusal`` refuses, at the places from ``arrival`` on."""
        for index, item in enumerate(items):
            self._buckets[item.item] = item.bucket
            self._queues.setdefault(item.bucket, deque()).append(_Waiting(item, arrival + index, now))

    def cancel(self, item: int) -> None:
        """Forget an item, if it is here; what a step in flight gives for it is dropped."""
        bucket = self._buckets.pop(item, None)
        if bucket is not None and self._in_flight.pop(item, None) is None:
            self._put_back(bucket, deque(one for one in self._queues[bucket] if one.item.item != item))

    def drain(self) -> list[int]:
        """Forget all items and return their ids."""
        items = list(self._buckets)
        self._buckets.clear()
        self._in_flight.clear()
        self._queues.clear()
        return items

    def due(self) -> float | None:
        """When the first batch that waits for company stops waiting; None where nothing waits."""
        return min((queue[0].offered + self._max_delay for queue in self._queues.values()), default=None)

    def plan(self, step: int, now: float, capacity: Capacity) -> tuple[StepPlan, StepWork] | None:
        """The ready batch whose head arrived first: one that cannot grow, or whose head has waited long enough."""
        ready = [
            queue
            for queue in self._queues.values()
            if now >= queue[0].offered + self._max_delay or self._batch(queue)[1]
        ]
        if not ready:
            return None
        queue = min(ready, key=lambda queue: queue[0].arrival)
        batch, _ = self._batch(queue)
        for one in batch:
            queue.popleft()
            self._in_flight[one.item.item] = now - one.offered
        self._put_back(batch[0].item.bucket, queue)
        rows = tuple(OneShotRow(item=one.item.item, bucket=one.item.bucket, rows=one.item.rows) for one in batch)
        work = StepWork(rows=sum(row.rows for row in rows))
        return StepPlan(step=step, engine=self.name, one_shot=rows), work

    def settle(self, plan: StepPlan, work: StepWork, result: StepResult) -> list[ItemUpdate]:
        """Each item of the step ends with its output."""
        updates = []
        for row, given in zip(plan.one_shot, result.rows, strict=True):
            waited = self._in_flight.pop(row.item, None)
            if waited is not None:
                del self._buckets[row.item]
                updates.append(ItemUpdate(item=row.item, end="stop", queue_seconds=waited, output=given.output))
        return updates

    def _batch(self, queue: deque[_Waiting]) -> tuple[list[_Waiting], bool]:
        """What one step would take from the queue, and whether it is full: no later arrival could join it."""
        batch: list[_Waiting] = []
        room = self._max_rows
        for one in queue:
            if one.item.rows > room:
                return batch, True
            batch.append(one)
            room -= one.item.rows
        return batch, room == 0

    def _put_back(self, bucket: int, queue: deque[_Waiting]) -> None:
        if queue:
            self._queues[bucket] = queue
        else:
            del self._queues[bucket]
