"""Items of one shape bucket that wait for a step, and who of them goes next."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

from server.scheduler.bucket_times import BucketTimes
from server.scheduler.class_shares import ClassShares
from server.scheduler.deadlines import Aim
from server.scheduler.fairness import Account
from server.scheduler.law import Law
from server.worker.wire import Item


@dataclass(frozen=True, slots=True, eq=False)
class WaitingBatch:
    """One item: rows that go into one step together."""

    item: Item
    arrival: int
    offered: float
    aim: Aim
    rank: int
    """Of its class."""
    account: Account
    """Of its tenant."""
    request: tuple[int, ...]
    """All items of its request, itself among them."""

    @property
    def arrived(self) -> float:
        """At the API process, on the scheduler's clock."""
        return self.offered - self.item.waited

    @property
    def deadline(self) -> float:
        return self.arrived + self.aim.ttft

    @property
    def expires(self) -> float:
        """When its client stops waiting."""
        return self.arrived + self.aim.timeout


Entry = tuple[float, int, WaitingBatch]
"""(key, arrival, item): ordered by the first two."""
Precedence = tuple[int, float, float, int]


class BucketQueue:
    """Inside a class the tenant goes first that was served least, and of its items the earliest deadline."""

    def __init__(self, law: Law, shares: ClassShares, times: BucketTimes) -> None:
        self.times = times
        self.rows = 0
        """Of all items here."""
        self._law = law
        self._shares = shares
        self._lists: dict[tuple[int, Account | None], list[Entry]] = {}  # none of them is empty
        self._items: dict[int, WaitingBatch] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: int) -> bool:
        return item in self._items

    def push(self, one: WaitingBatch) -> None:
        place, entry = self._place(one)
        insort(self._lists.setdefault(place, []), entry)
        self._items[one.item.item] = one
        self.rows += one.item.rows
        self._shares.came(one.rank)

    def remove(self, item: int) -> WaitingBatch:
        one = self._items.pop(item)
        place, entry = self._place(one)
        entries = self._lists[place]
        del entries[bisect_left(entries, entry)]
        if not entries:
            del self._lists[place]
        self.rows -= one.item.rows
        self._shares.left(one.rank)
        return one

    def _place(self, one: WaitingBatch) -> tuple[tuple[int, Account | None], Entry]:
        key = one.deadline if self._law.deadline_order else 0.0
        return (one.rank, one.account if self._law.fairness else None), (key, one.arrival, one)

    @property
    def oldest(self) -> WaitingBatch:
        return next(iter(self._items.values()))

    @property
    def earliest_deadline(self) -> float:
        return min(entries[0][2].deadline for entries in self._lists.values())

    def heads(self) -> list[WaitingBatch]:
        """The first of each tenant in each class."""
        return [entries[0][2] for entries in self._lists.values()]

    def precedence(self, one: WaitingBatch, now: float) -> Precedence:
        """Sorts items, of whatever bucket, by who goes first."""
        served = one.account.served if self._law.fairness else 0.0
        key = one.deadline if self._law.deadline_order else 0.0
        return self._shares.present_rank(one.rank, now - one.arrived), served, key, one.arrival

    def ordered(self, now: float) -> Iterator[WaitingBatch]:
        """As they will be served: each counts for its tenant before the next one is chosen."""
        heads = [(self.precedence(entries[0][2], now), 0, entries) for entries in self._lists.values()]
        heapq.heapify(heads)
        while heads:
            (_, served, *_), index, entries = heads[0]
            one = entries[index][2]
            yield one
            if index + 1 == len(entries):
                heapq.heappop(heads)
                continue
            rank, _, key, arrival = self.precedence(entries[index + 1][2], now)
            served += one.item.rows * self.times.per_row / one.account.weight
            heapq.heapreplace(heads, ((rank, served, key, arrival), index + 1, entries))

    def batch(self, now: float, start: float, most_rows: int, safety: float) -> tuple[list[WaitingBatch], str]:
        """What one step would take, and what keeps later arrivals out of it; empty where nothing does.

        As many as fit with which all of them are in time that can be, with times that are off by the factor ``safety``.
        """
        seconds = self.times.seconds
        least = math.inf
        chosen: list[WaitingBatch] = []
        rows = 0
        for one in self.ordered(now):
            more = rows + one.item.rows
            if more > most_rows:
                return chosen, "its size"
            if self._law.budget == "slack":
                in_time = (one.deadline - start) / safety
                if seconds(one.item.rows) <= in_time:
                    least = min(least, in_time)
                if chosen and seconds(more) > least:
                    return chosen, "a deadline"
            chosen.append(one)
            rows = more
        return chosen, "its size" if rows == most_rows else ""
