"""Items that were taken and are dropped before their first token: too late for their target, or for their client."""

from __future__ import annotations

import heapq
import math

import msgspec

from server.scheduler.items import SequenceState
from server.worker.wire import Refusal

RETRY = (1.0, 30.0)
"""Bounds in seconds of what a refused client is told to wait."""


class Dropped(msgspec.Struct, frozen=True, kw_only=True):
    """All items of one request, none of which has had a token."""

    items: list[int]
    kind: Refusal
    reason: str
    """For the client."""
    retry_after: float = 0.0
    """Seconds until the queue of now should be worked off; 0 where trying again is of no use."""


def overloaded(items: list[int], drain: float) -> Dropped:
    """``drain`` seconds are predicted for the queue of now."""
    least, most = RETRY
    return Dropped(
        items=items,
        kind="overload",
        reason="the server is overloaded: the answer could not have begun in time",
        retry_after=min(max(drain, least), most),
    )


def timed_out(items: list[int]) -> Dropped:
    return Dropped(items=items, kind="timeout", reason="the request waited longer than its client does")


class Expiries:
    """When clients stop waiting for first tokens."""

    def __init__(self) -> None:
        # Items that are gone or started stay in the heap until they reach its head.
        self._heap: list[tuple[float, int, SequenceState]] = []

    def watch(self, state: SequenceState) -> None:
        if state.aim.timeout < math.inf and not state.started:
            heapq.heappush(self._heap, (state.arrived + state.aim.timeout, state.arrival, state))

    def expired(self, now: float) -> list[SequenceState]:
        """Items without a token whose client has gone by now; each is told once."""
        found = []
        while self._heap and (self._heap[0][0] <= now or self._heap[0][2].gone):
            state = heapq.heappop(self._heap)[2]
            if not state.gone and not state.started:
                found.append(state)
        return found
