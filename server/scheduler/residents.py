"""Items that hold a slot and KV blocks, by class and arrival: how they get blocks, share finished ones and give way."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator

from engines.protocol import Capacity
from server.scheduler.block_pool import BlockPool
from server.scheduler.items import SequenceState

IMMUNE = 2
"""Preemptions after which an item is spared as long as anybody else can give way."""
RESERVE = 16.0
"""Most blocks that a newcomer leaves for each resident."""
RELAX = 0.98
"""How the blocks that newcomers leave shrink with each of them, towards 1 for each resident."""

NEW_SHARE = 0.05
"""Share of the latest output in the running mean of their lengths."""


def _seniority(state: SequenceState) -> tuple[int, int]:
    return state.rank, state.arrival


class Residents:
    """Slots 0 .. max_rows-1 and the block pool of one engine.

    The order of seniority (class, then arrival) is total and does not change, and blocks are only ever taken from a
    junior, so the most senior resident always gets on.
    """

    def __init__(self, capacity: Capacity, max_rows: int, prefix_cache: bool) -> None:
        self.pool = BlockPool(capacity.blocks)
        self._block_size = capacity.block_size
        self._max_rows = max_rows
        self._prefix_cache = prefix_cache
        # A heap: low slots first, so that the used ones stay together.
        self._free_slots = list(range(max_rows))
        self._states: list[SequenceState] = []
        self._reserve = 1.0
        self._typical_output: float | None = None

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[SequenceState]:
        """By seniority. One that leaves during the iteration must come after the present one."""
        return iter(self._states)

    @property
    def full(self) -> bool:
        return not self._free_slots

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def may_match(self, state: SequenceState) -> bool:
        """It may start from blocks that others computed."""
        return self._prefix_cache and not state.wants_prompt_logprobs

    def place(self, state: SequenceState) -> int | None:
        """Give the item a slot and blocks for all its known tokens.

        Returns how many blocks were found by their content; None, and no change, where there are too few.

        All blocks at once, not chunk by chunk, so that prompts admitted together cannot starve each other half-way.
        Some must stay for the residents' next tokens, or the newcomer would soon be preempted; more for a while after
        a preemption.
        """
        matched = self._matched(state)
        new_blocks = self.pool.reserve(matched, *self._wanted(state, matched))
        if new_blocks is None:
            return None
        state.blocks = matched + new_blocks
        state.computed = len(matched) * self._block_size
        state.committed = len(matched)
        state.slot = heapq.heappop(self._free_slots)
        state.account.slots += 1
        insort(self._states, state, key=_seniority)
        self._reserve = max(1.0, self._reserve * RELAX)
        return len(matched)

    def fits(self, state: SequenceState) -> bool:
        """``place`` would give it a place."""
        if self.full:
            return False
        matched = self._matched(state)
        return self.pool.can_reserve(matched, *self._wanted(state, matched))

    def _matched(self, state: SequenceState) -> list[int]:
        if not self.may_match(state):
            return []
        # The block of the last known token is never matched whole: that token's logits draw the next one.
        return self.pool.match(state.hashes((len(state.tokens) - 1) // self._block_size))

    def _wanted(self, state: SequenceState, matched: list[int]) -> tuple[int, int]:
        """Blank blocks, and blocks that must stay."""
        return self.blocks_for(state.known_to_compute) - len(matched), self._kept_free()

    def _kept_free(self) -> int:
        """Residents grow until they end: half of what they still need together, and some for chance."""
        growth = 0.0
        for state in self._states:
            growth += max(0.0, state.item.prompt_length + self._expected_output(state) - state.known)
        return int(growth / 2 / self._block_size + self._reserve * len(self._states))

    def _expected_output(self, state: SequenceState) -> float:
        output = state.limit - state.item.prompt_length
        return output / 2 if self._typical_output is None else min(output, self._typical_output)

    def typical_output(self) -> float:
        """Tokens that a resident should have given when it ends, on average; 0 of none."""
        return sum(map(self._expected_output, self._states)) / max(1, len(self._states))

    def ended(self, output: int) -> None:
        """An item ended after so many output tokens."""
        known = output if self._typical_output is None else self._typical_output
        self._typical_output = known + NEW_SHARE * (output - known)

    def findable(self, state: SequenceState) -> int:
        """Tokens of the item that ``place`` would find now."""
        return len(self._matched(state)) * self._block_size

    @property
    def lowest_rank(self) -> int:
        """Class of the most junior resident; 0 where there is none."""
        return self._states[-1].rank if self._states else 0

    def missing_blocks(self, state: SequenceState, count: int) -> int:
        """Blocks that a resident lacks for its next ``count`` tokens; not more than 0 where it has them."""
        return self.blocks_for(state.computed + count) - len(state.blocks)

    def has_room(self, state: SequenceState) -> bool:
        """A resident needs no further block for its next token."""
        return state.computed < len(state.blocks) * self._block_size

    def grow(self, state: SequenceState, blocks: int) -> tuple[int, ...] | None:
        """Append blank blocks to the item's table; None, and no change, where there are too few."""
        new_blocks = self.pool.reserve((), blocks)
        if new_blocks is None:
            return None
        state.blocks += new_blocks
        return tuple(new_blocks)

    def victim(self, state: SequenceState, cost: Callable[[SequenceState], float]) -> SequenceState | None:
        """Who should give way to ``state``, a resident: a junior of the lowest class that is hurt least.

        ``cost`` is what giving way would do to a resident, in seconds. None where all juniors are immune; only the most
        senior resident may take from those.
        """
        juniors = self._states[bisect_right(self._states, _seniority(state), key=_seniority) :]
        spare = [junior for junior in juniors if junior.preempted < IMMUNE]
        if not spare and self._states[0] is state:
            spare = juniors
        return min(spare, key=lambda junior: (-junior.rank, cost(junior)), default=None)

    def lower(self, rank: int, cost: Callable[[SequenceState], float]) -> SequenceState | None:
        """Who of a class below ``rank`` should give way to a newcomer; None where none of them can."""
        below = self._states[bisect_right(self._states, (rank, math.inf), key=_seniority) :]
        spare = [junior for junior in below if junior.preempted < IMMUNE]
        return min(spare, key=lambda junior: (-junior.rank, cost(junior)), default=None)

    def preempt(self, state: SequenceState) -> None:
        """Take slot and blocks for others; from now on newcomers leave more room."""
        self.vacate(state)
        self._reserve = min(2 * self._reserve, RESERVE)

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
        state.account.slots -= 1
        del self._states[bisect_left(self._states, _seniority(state), key=_seniority)]

    def integrity(self) -> list[str]:
        """Recount blocks and slots; one text for each contradiction."""
        errors = self.pool.integrity(state.blocks for state in self._states)
        slots = sorted([*self._free_slots, *(state.slot for state in self._states)])
        if slots != list(range(self._max_rows)):
            errors.append(f"slots, free and taken, are {slots}")
        if self._states != sorted(self._states, key=_seniority):
            errors.append("residents are not in the order of seniority")
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
