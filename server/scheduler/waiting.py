"""Items that hold no slot: a queue by arrival, and groups parked behind their leader's prompt."""

from __future__ import annotations

import heapq

from server.scheduler.items import Group, SequenceState


class WaitingQueue:
    """Strictly by arrival. An item that was preempted comes back to the place it had."""

    def __init__(self) -> None:
        # Items that are gone stay in the heap until they reach its head.
        self._heap: list[tuple[int, SequenceState]] = []

    def push(self, state: SequenceState) -> None:
        heapq.heappush(self._heap, (state.arrival, state))

    def head(self) -> SequenceState | None:
        """The earliest arrival. Changes nothing that a caller could see."""
        while self._heap:
            state = self._heap[0][1]
            if not state.gone:
                return state
            heapq.heappop(self._heap)
        return None

    def pop(self) -> SequenceState:
        """Remove what ``head`` gave."""
        return heapq.heappop(self._heap)[1]

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
        group, state.group = state.group, None
        if group is None:
            return
        if group.leader is not state:
            group.parked.remove(state)
        elif group.parked:
            group.leader = group.parked.pop(0)
            self.push(group.leader)
