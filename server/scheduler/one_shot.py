"""Scheduling of the items of one engine that end after one step: a plain model's rows in a shape bucket.

A step takes the largest batch with which its head is still in time. Heads that cannot be in time are dropped early
where they are firm, so that the batch stays as large as it pays (Nexus, SOSP 2019); the others are served as it goes.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from engines.protocol import Capacity, OneShotRow, RowResult, StepPlan, StepResult, StepSample
from server.scheduler.bucket_times import BucketTimes
from server.scheduler.class_shares import ClassShares
from server.scheduler.config import SchedulerConfig
from server.scheduler.deadlines import aim_of
from server.scheduler.drops import Dropped, overloaded, timed_out
from server.scheduler.fairness import TenantAccounts
from server.scheduler.items import RANKS, ItemUpdate, StepWork
from server.scheduler.law import Law
from server.scheduler.one_shot_queue import BucketQueue, WaitingBatch
from server.scheduler.prediction_errors import PredictionErrors
from server.worker.wire import Item

BACKLOG = 2
"""Full batches waiting, above which heads are dropped rather than batches made smaller."""
MAX_BUCKETS = 1024
"""Of which step times are kept."""
log = logging.getLogger(__name__)


class OneShotLane:
    """One queue a bucket; a step takes the head of one queue and what fits behind it. Holds no blocks and no slots."""

    def __init__(self, name: str, capacity: Capacity, config: SchedulerConfig, law: Law) -> None:
        self.name = name
        self.decisions: Counter[str] = Counter()
        self.errors = PredictionErrors()
        self._capacity = capacity
        self._config = config
        self._law = law
        self._max_rows = min(capacity.max_rows, config.max_batch or capacity.max_rows)
        self._shares = ClassShares(law)
        self._accounts = TenantAccounts()
        self._expiries: list[tuple[float, int, WaitingBatch]] = []  # a heap; whoever is gone stays until its time
        self._items: dict[int, WaitingBatch] = {}  # all that are here
        self._queues: dict[int, BucketQueue] = {}  # by bucket
        self._in_flight: dict[int, float] = {}  # item: seconds that it waited
        self._suspects: list[WaitingBatch] = []
        self._dropped: list[Dropped] = []
        self._said = False

    def __contains__(self, item: int) -> bool:
        return item in self._items

    def reconfigured(self, config: SchedulerConfig, law: Law) -> OneShotLane:
        """An empty lane to go on in this one's place, with other settings and what this one has learned and counted."""
        lane = OneShotLane(self.name, self._capacity, config, law)
        lane.decisions, lane.errors = self.decisions, self.errors
        lane._queues = {bucket: BucketQueue(law, lane._shares, old.times) for bucket, old in self._queues.items()}
        return lane

    def seed(self, samples: Sequence[StepSample]) -> None:
        """Start from steps that the engine measured at load."""
        for bucket in {sample.bucket for sample in samples if sample.bucket is not None}:
            self._queue_of(bucket).times.seed([sample for sample in samples if sample.bucket == bucket])

    @property
    def running(self) -> int:
        return len(self._in_flight)

    @property
    def waiting(self) -> int:
        return len(self._items) - len(self._in_flight)

    @property
    def predicted_wait(self) -> float:
        """Seconds until an item that comes now would run, if all that waits goes before it."""
        return sum(map(self._drain, self._queues.values()))

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
        """Take all items of one request, none of which ``refusal`` refuses, at the places from ``arrival`` on."""
        request = tuple(item.item for item in items)
        for index, item in enumerate(items):
            rank = RANKS[item.priority] if self._law.priorities else 0
            account = self._accounts.enter(item.tenant, item.weight, now)
            aim = aim_of(item, self._config)
            one = WaitingBatch(item, arrival + index, now, aim, rank, account, request)
            self._items[item.item] = one
            if item.suspect:
                self._suspects.append(one)
                continue
            self._queue_of(item.bucket).push(one)
            if one.expires < math.inf:
                heapq.heappush(self._expiries, (one.expires, one.arrival, one))

    def _queue_of(self, bucket: int) -> BucketQueue:
        queue = self._queues.get(bucket)
        if queue is None:
            self._forget_idle_buckets()
            times = BucketTimes(self._capacity.one_shot_rows, self.errors)
            queue = self._queues[bucket] = BucketQueue(self._law, self._shares, times)
        return queue

    def _forget_idle_buckets(self) -> None:
        """Of shapes that clients choose there is no end; what was learned of one that nobody uses now goes."""
        if len(self._queues) >= MAX_BUCKETS:
            busy = {one.item.bucket for one in self._items.values()}
            self._queues = {bucket: queue for bucket, queue in self._queues.items() if bucket in busy}

    def cancel(self, item: int) -> None:
        """Forget an item, if it is here; what a step in flight gives for it is dropped."""
        one = self._items.get(item)
        if one is not None:
            self._forget(one)

    def _forget(self, one: WaitingBatch) -> None:
        item = one.item.item
        del self._items[item]
        self._accounts.leave(one.account)
        if self._in_flight.pop(item, None) is not None:
            return
        queue = self._queue_of(one.item.bucket)
        if item in queue:
            queue.remove(item)
        else:
            self._suspects.remove(one)

    def drain(self) -> list[int]:
        """Forget all items and return their ids."""
        items = list(self._items)
        for item in items:
            self.cancel(item)
        return items

    def dropped(self) -> list[Dropped]:
        """Items that ``plan`` dropped since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def due(self) -> float | None:
        """When the first batch that waits for company stops waiting; None where nothing waits."""
        return min((self._ready_at(queue) for queue in self._queues.values() if len(queue)), default=None)

    def plan(self, step: int, now: float, start: float, capacity: Capacity) -> tuple[StepPlan, StepWork] | None:
        """The ready batch whose head comes first: one that cannot grow, or whose head must go now."""
        self._drop_late(now, start)
        ready = []
        for queue in self._queues.values():
            if len(queue):
                batch, bound = queue.batch(now, start, self._max_rows, self.errors.safety)
                # A clock that went back must not make anybody wait for it.
                if bound or now >= self._ready_at(queue) or now < queue.oldest.offered:
                    ready.append((queue.precedence(batch[0], now), queue, batch, bound))
        if not ready:
            if any(map(len, self._queues.values())):
                self.decisions["batch waits for company"] += 1
            return None
        _, queue, batch, bound = min(ready, key=lambda one: one[0])
        self.decisions[f"batch bound by {bound or 'what waits'}"] += 1
        self._take(batch, queue, now)
        return self._step(step, batch, queue)

    def _take(self, batch: list[WaitingBatch], queue: BucketQueue, now: float) -> None:
        rows = sum(one.item.rows for one in batch)
        by_rank = []
        for one in batch:
            if one.rank and self._shares.starved(one.rank):
                self.decisions["admitted by its class's floor"] += 1
            else:
                by_rank.append(one)
            self._tell_unreachable(one, queue)
            queue.remove(one.item.item)
            self._shares.served(one.rank, one.item.rows)
            one.account.charge(queue.times.seconds(rows) * one.item.rows / rows)
            self._in_flight[one.item.item] = now - one.offered
        # Only now it is known who of a higher class was left behind.
        overtook = sum(1 for one in by_rank if self._shares.overtakes(one.rank, now - one.arrived))
        if overtook:
            self.decisions["admitted by its age"] += overtook

    def plan_alone(self, step: int, now: float, capacity: Capacity) -> tuple[StepPlan, StepWork] | None:
        """A step of the first suspect and of no other item."""
        if not self._suspects:
            return None
        one = self._suspects.pop(0)
        self._in_flight[one.item.item] = now - one.offered
        return self._step(step, [one], self._queue_of(one.item.bucket))

    def _step(self, step: int, batch: list[WaitingBatch], queue: BucketQueue) -> tuple[StepPlan, StepWork]:
        items = (one.item for one in batch)
        rows = tuple(OneShotRow(item=item.item, bucket=item.bucket, rows=item.rows) for item in items)
        total = sum(row.rows for row in rows)
        work = StepWork(rows=total, seconds=queue.times.seconds(total))
        return StepPlan(step=step, engine=self.name, one_shot=rows, padded_rows=queue.times.padded(total)), work

    def settle(self, plan: StepPlan, work: StepWork, result: StepResult, now: float) -> list[ItemUpdate]:
        """Each item of the step ends with its output."""
        updates = []
        for row, given in zip(plan.one_shot, result.rows, strict=True):
            waited = self._in_flight.get(row.item)
            if waited is not None:
                self._forget(self._items[row.item])
                updates.append(_update(given, waited))
        queue = self._queue_of(plan.one_shot[0].bucket)
        if ignored := result.irregular or queue.times.observe(work.rows, result.seconds):
            self.decisions[f"step not learned: {ignored}"] += 1
        return updates

    # --- deadlines

    def _ready_at(self, queue: BucketQueue) -> float:
        """A batch waits for company while nobody has waited too long and the earliest deadline allows it."""
        slack_ends = queue.earliest_deadline - queue.times.seconds(queue.rows) * self.errors.safety
        return max(queue.oldest.offered, min(queue.oldest.offered + self._config.max_delay, slack_ends))

    def _drop_late(self, now: float, start: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            one = heapq.heappop(self._expiries)[2]
            if self._items.get(one.item.item) is one:
                self._drop(one, timed_out, "client's time ran out")
        if not self._law.late_drop:
            return
        for queue in self._queues.values():
            drain = self._drain(queue)
            while late := [one for one in queue.heads() if self._late(one, queue, start)]:
                for one in late:
                    self._drop(one, partial(overloaded, drain=drain), "dropped late")

    def _drain(self, queue: BucketQueue) -> float:
        """Seconds to work the queue off in full batches."""
        return queue.times.seconds(self._max_rows) * queue.rows / self._max_rows

    def _late(self, one: WaitingBatch, queue: BucketQueue, start: float) -> bool:
        """It cannot be in time, and its target is in reach: nobody else here, it would be."""
        if not one.aim.firm or not self._droppable(one):
            return False
        rows = self._max_rows if queue.rows > BACKLOG * self._max_rows else one.item.rows
        takes = queue.times.seconds(rows) * self.errors.safety
        return one.deadline < start + takes and self._alone(one, queue) < one.aim.ttft

    def _alone(self, one: WaitingBatch, queue: BucketQueue) -> float:
        """Seconds that it takes, almost surely, with nobody else here."""
        return queue.times.seconds(one.item.rows) * self.errors.safety

    def _tell_unreachable(self, one: WaitingBatch, queue: BucketQueue) -> None:
        """Of one that is served although it must be late: logged once."""
        alone = self._alone(one, queue)
        if not one.aim.asked_ttft or alone < one.aim.ttft:
            return
        self.decisions["ttft out of reach"] += 1
        if not self._said:
            self._said = True
            log.warning(
                "a batch of %d rows alone takes %.3g s here, more than the target of %.3g s: such batches are served "
                "as fast as it goes",
                one.item.rows,
                alone,
                one.aim.ttft,
            )

    def _droppable(self, one: WaitingBatch) -> bool:
        """All items of its request still wait: they are refused together or not at all."""
        queued = (self._items.get(item) for item in one.request)
        return all(each is not None and each.item.item in self._queue_of(each.item.bucket) for each in queued)

    def _drop(self, one: WaitingBatch, ending: Callable[[list[int]], Dropped], reason: str) -> None:
        if not self._droppable(one):
            return
        self._dropped.append(ending(list(one.request)))
        self.decisions[reason] += len(one.request)
        for item in one.request:
            self._forget(self._items[item])


def _update(given: RowResult, waited: float) -> ItemUpdate:
    if given.error:
        return ItemUpdate(item=given.item, end="error", queue_seconds=waited, error=given.error)
    return ItemUpdate(item=given.item, end="stop", queue_seconds=waited, output=given.output)
