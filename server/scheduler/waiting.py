"""Items that hold no slot: who goes next, and groups parked behind their leader's prompt.

Classes come first (high, normal, low), but a class that waits gets a small share of all prompt tokens whatever the
others do, and an item that waited long counts for the class above. Inside a class an item that had a place already
(it was preempted, or its worker died) goes before new ones; of these the tenant goes first that was served least, and
of its items the one with the earliest deadline.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

from server.scheduler.class_shares import CLASSES, ClassShares
from server.scheduler.fairness import Account
from server.scheduler.items import Group, SequenceState
from server.scheduler.law import Law

Entry = tuple[float, int, SequenceState]
"""(key, arrival, state): ordered by the key, never by the state."""
Precedence = tuple[int, float, float, int]


class _ClassQueue:
    """Waiting items of one class, by tenant."""

    def __init__(self, law: Law) -> None:
        self._law = law
        self.returning: list[Entry] = []
        self.tenants: dict[Account | None, list[Entry]] = {}  # none of the lists is empty
        self.sizes: dict[SequenceState, int] = {}
        """Tokens that each has to compute, in the order in which they came here."""
        self.tokens = 0

    def _place(self, state: SequenceState) -> tuple[Account | None, Entry]:
        key = state.deadline if self._law.deadline_order else 0.0
        return state.account if self._law.fairness else None, (key, state.arrival, state)

    @staticmethod
    def _returns(state: SequenceState) -> bool:
        return state.started or state.preempted > 0

    def push(self, state: SequenceState) -> None:
        self.sizes[state] = len(state.tokens) - state.known_hit
        self.tokens += self.sizes[state]
        account, entry = self._place(state)
        if self._returns(state):
            insort(self.returning, (-math.inf, state.arrival, state))
        else:
            insort(self.tenants.setdefault(account, []), entry)

    def remove(self, state: SequenceState) -> None:
        self.tokens -= self.sizes.pop(state)
        account, entry = self._place(state)
        if self._returns(state):
            del self.returning[bisect_left(self.returning, (-math.inf, state.arrival, state))]
            return
        queue = self.tenants[account]
        del queue[bisect_left(queue, entry)]
        if not queue:
            del self.tenants[account]

    def came_first(self) -> float:
        """When the one arrived that waits longest for its first token; ``math.inf`` where none does."""
        return next((state.arrived for state in self.sizes if not state.started), math.inf)

    def head(self, free: int | None) -> SequenceState | None:
        if self.returning:
            return self.returning[0][2]
        heads = [
            (account.served if account else 0.0, queue[0])
            for account, queue in self.tenants.items()
            if free is None or account is None or not account.takes_more_than_its_share(free)
        ]
        return min(heads)[1][2] if heads else None

    def ordered(self, placed: Sequence[SequenceState]) -> Iterator[SequenceState]:
        """Waiting items and those of ``placed``, which have a slot already, as they will be served."""
        yield from (entry[2] for entry in self.returning)
        queues = {account: iter(queue) for account, queue in self.tenants.items()}
        for state in placed:
            account, entry = self._place(state)
            queues[account] = heapq.merge([entry], queues.get(account, iter(())))
        if len(queues) == 1:
            yield from (entry[2] for entry in next(iter(queues.values())))
            return
        heads = [(account.served if account else 0.0, next(queue), account, queue) for account, queue in queues.items()]
        heapq.heapify(heads)
        while heads:
            served, entry, account, queue = heads[0]
            state = entry[2]
            yield state
            # One that has a slot was charged when it got it.
            cost = 0.0 if state.slot >= 0 else (len(state.tokens) - state.known_hit) / state.account.weight
            following = next(queue, None)
            if following is None:
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, (served + cost, following, account, queue))


class WaitingQueue:
    """All waiting items of one engine's sequences."""

    def __init__(self, law: Law) -> None:
        self._law = law
        self._classes = [_ClassQueue(law) for _ in range(CLASSES)]
        self._shares = ClassShares(law)

    def __len__(self) -> int:
        return sum(len(queue.sizes) for queue in self._classes)

    def __contains__(self, state: SequenceState) -> bool:
        return state in self._classes[state.rank].sizes

    @property
    def tokens(self) -> int:
        """To compute, of all items."""
        return sum(queue.tokens for queue in self._classes)

    def push(self, state: SequenceState) -> None:
        self._shares.came(state.rank)
        self._classes[state.rank].push(state)

    def remove(self, state: SequenceState) -> None:
        """It got a slot, or is gone."""
        self._shares.left(state.rank)
        self._classes[state.rank].remove(state)

    def postpone(self, state: SequenceState, deadline: float) -> None:
        """Another deadline for an item, waiting or not."""
        waits = state in self
        if waits:
            self.remove(state)
        state.deadline = deadline
        if waits:
            self.push(state)

    def backlog(self, rank: int) -> tuple[int, float]:
        """Tokens to compute of this class and higher ones, and when the one arrived that waits longest for its first
        token."""
        queues = self._classes[: rank + 1]
        return sum(queue.tokens for queue in queues), min(queue.came_first() for queue in queues)

    def head(self, now: float, free: int | None = None) -> SequenceState | None:
        """Who is next; of tenants that take no more than their share of slots, where ``free`` of them are left.

        One that had a place already comes back whatever its tenant has. Changes nothing.
        """
        best: tuple[Precedence, SequenceState] | None = None
        for rank in range(CLASSES):
            if self._shares.waits(rank):
                state = self._classes[rank].head(free)
                if state is None:
                    continue
                precedence = self.precedence(state, now)
                if best is None or precedence < best[0]:
                    best = precedence, state
        return None if best is None else best[1]

    def precedence(self, state: SequenceState, now: float) -> Precedence:
        """Sorts items, waiting or not, by who gets prompt tokens first."""
        key = state.deadline if self._law.deadline_order else 0.0
        if not self._law.priorities:
            return 0, 0.0, key, state.arrival
        rank = self._shares.present_rank(state.rank, now - state.arrived)
        if state.started or state.preempted:
            return rank, -math.inf, key, state.arrival
        return rank, state.account.served if self._law.fairness else 0.0, key, state.arrival

    def claim(self, state: SequenceState, now: float) -> Literal["", "its class's floor", "its age"]:
        """What puts one that is next before others, where it is not its class, tenant and deadline alone."""
        if state.rank and self._shares.starved(state.rank):
            return "its class's floor"
        return "its age" if self._shares.overtakes(state.rank, now - state.arrived) else ""

    def served(self, rank: int, tokens: int) -> None:
        """Prompt tokens of this class are in a step now."""
        self._shares.served(rank, tokens)

    def ordered(self, placed: Sequence[SequenceState], limit: int) -> Iterator[SequenceState]:
        """The first ``limit`` of the waiting items and of ``placed``, prompts in the making, as they will be served."""
        ranks = (
            queue.ordered([state for state in placed if state.rank == rank])
            for rank, queue in enumerate(self._classes)
            if self._shares.waits(rank) or any(state.rank == rank for state in placed)
        )
        return islice((state for rank in ranks for state in rank), limit)

    # --- groups

    def park(self, leader: SequenceState, siblings: list[SequenceState], shared_blocks: int) -> None:
        """Queue the leader; its siblings follow once ``shared_blocks`` blocks of it are findable, and match them."""
        group = Group(leader, shared_blocks, siblings)
        for state in (leader, *siblings):
            state.group = group
        self.push(leader)

    def committed(self, state: SequenceState) -> None:
        """More blocks of this item are findable than before."""
        group = state.group
        if group is not None and group.leader is state and state.committed >= group.shared_blocks:
            for member in (state, *group.parked):
                member.group = None
            for sibling in group.parked:
                self.push(sibling)

    def forget(self, state: SequenceState) -> None:
        """The item is gone. If others waited for it, the first of them leads from now on."""
        if state in self:
            self.remove(state)
        group, state.group = state.group, None
        if group is None:
            return
        if group.leader is not state:
            group.parked.remove(state)
        elif group.parked:
            group.leader = group.parked.pop(0)
            self.push(group.leader)
