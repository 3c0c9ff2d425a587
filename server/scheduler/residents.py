"""Items that hold a slot and KV blocks, by arrival: how they get blocks, share finished ones and give way."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from engines.protocol import Capacity
from server.scheduler.block_pool import BlockPool
from server.scheduler.items import SequenceState

_arrival = attrgetter("arrival")


class Residents:
    """Slots 0 .. max_rows-1 and the block pool of one engine."""

    def __init__(self, capacity: Capacity, max_rows: int, prefix_cache: bool) -> None:
        self.pool = BlockPool(capacity.blocks)
        self._block_size = capacity.block_size
        self._max_rows = max_rows
        self._prefix_cache = prefix_cache
        # A heap: low slots first, so that the used ones stay together.
        self._free_slots = list(range(max_rows))
        self._states: list[SequenceState] = []

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[SequenceState]:
        """By arrival. One that leaves during the iteration must come after the present one."""
        return iter(self._states)

    @property
    def full(self) -> bool:
        return not self._free_slots

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def may_match(self, state: SequenceState) -> bool:
        """It may start from blocks that others computed."""
        return self._prefix_cache and not state.wants_prompt_logprobs

    def place(self, state: SequenceState) -> int | None:
        """Give the item a slot and blocks for all its known tokens.

        Returns how many blocks were found by their content; None, and no change, where there are too few.

        All blocks at once, not chunk by chunk, so that prompts admitted together cannot starve each other half-way.
        One more must stay for each resident, or the newcomer would soon be preempted for their next tokens.
        """
        # The block of the last known token is never matched whole: that token's logits draw the next one.
        findable = (len(state.tokens) - 1) // self._block_size if self.may_match(state) else 0
        matched = self.pool.match(state.hashes(findable))
        blank = self.blocks_for(state.known_to_compute) - len(matched)
        new_blocks = self.pool.reserve(matched, blank, keep=len(self._states))
        if new_blocks is None:
            return None
        state.blocks = matched + new_blocks
        state.computed = len(matched) * self._block_size
        state.committed = len(matched)
        state.slot = heapq.heappop(self._free_slots)
        insort(self._states, state, key=_arrival)
        return len(matched)

    def missing_blocks(self, state: SequenceState, count: int) -> int:
        """Blocks that a resident lacks for its next ``count`` tokens; not more than 0 where it has them."""
        return self.blocks_for(state.computed + count) - len(state.blocks)

    def grow(self, state: SequenceState, blocks: int) -> tuple[int, ...] | None:
        """Append blank blocks to the item's table; None, and no change, where there are too few."""
        new_blocks = self.pool.reserve((), blocks)
        if new_blocks is None:
            return None
        state.blocks += new_blocks
        return tuple(new_blocks)

    def latest(self) -> SequenceState:
        """The resident that arrived last."""
        return self._states[-1]

    def commit(self, state: SequenceState) -> None:
        """Make findable the full blocks whose tokens are settled and whose step is planned.

        Not the block of the last settled token: that token is still to be computed, or is in a step in flight, or is
        computed again where a step drew nothing. So a findable block is never written again.
        """
        full = min(len(state.tokens) - 1, state.computed) // self._block_size
        if full <= state.committed or not self._prefix_cache:
            return
        for index in range(state.committed, full):
            self.pool.commit(state.blocks[index], state.hash_at(index))
        state.committed = full

    def vacate(self, state: SequenceState) -> None:
        """Take slot and blocks back. Blocks that are findable stay so until they are reused."""
        self.pool.release(state.blocks)
        state.blocks = []
        heapq.heappush(self._free_slots, state.slot)
        state.slot = -1
        del self._states[bisect_left(self._states, state.arrival, key=_arrival)]

    def integrity(self) -> list[str]:
        """Recount blocks and slots; one text for each contradiction."""
        errors = self.pool.integrity(state.blocks for state in self._states)
        slots = sorted([*self._free_slots, *(state.slot for state in self._states)])
        if slots != list(range(self._max_rows)):
            errors.append(f"slots, free and taken, are {slots}")
        if self._states != sorted(self._states, key=_arrival):
            errors.append("residents are not in the order of arrival")
        for state in self._states:
            item = state.item.item
            if not state.committed * self._block_size <= state.computed <= len(state.blocks) * self._block_size:
                errors.append(
                    f"item {item} has {state.committed} blocks findable, {len(state.blocks)} held, "
                    f"{state.computed} tokens computed"
                )
            if state.computed > state.known or state.gone:
                errors.append(f"item {item} has computed {state.computed} of {state.known} tokens, gone: {state.gone}")
        return errors
