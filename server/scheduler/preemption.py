"""Who gives its slot and blocks up so that others can go on."""

from __future__ import annotations

import math

from server.scheduler.draft import Tally
from server.scheduler.items import SequenceState
from server.scheduler.residents import Residents
from server.scheduler.step_time import StepTimeModel
from server.scheduler.waiting import WaitingQueue


class Preemption:
    """Takes from residents what others need more: by ``Residents``' rules of who may be taken from, and by cost."""

    def __init__(self, residents: Residents, waiting: WaitingQueue, model: StepTimeModel, tally: Tally) -> None:
        self._residents = residents
        self._waiting = waiting
        self._model = model
        self._tally = tally

    def room_for(self, state: SequenceState, missing: int) -> tuple[int, ...] | None:
        """So many more blocks for a resident, taken from juniors if need be; None where there are too few."""
        new_blocks = self._residents.grow(state, missing)
        while new_blocks is None:
            victim = self._residents.victim(state, self._cost)
            if victim is None:
                return None
            self.preempt(victim, "preempted for blocks")
            new_blocks = self._residents.grow(state, missing)
        return new_blocks

    def lower(self, rank: int, reason: str) -> bool:
        """Preempt one resident of a class below ``rank``; False where there is none."""
        victim = self._residents.lower(rank, self._cost)
        if victim is None:
            return False
        self.preempt(victim, reason)
        return True

    def _cost(self, state: SequenceState) -> float:
        """Seconds to compute it again, less the slack that it has."""
        due = state.due()
        slack = min(due if due < math.inf else state.deadline, 1e9)
        return self._model.added(state.computed, state.computed * state.computed / 2) - slack

    def preempt(self, state: SequenceState, reason: str) -> None:
        """Take slot and blocks; all is computed again later, but for blocks that can still be found then."""
        self._residents.preempt(state)
        state.computed_before = max(state.computed_before, state.computed)
        state.computed = 0
        state.preempted += 1
        self._tally.preemptions += 1
        self._tally.decisions[reason] += 1
        if not state.suspect:
            self._waiting.push(state)
