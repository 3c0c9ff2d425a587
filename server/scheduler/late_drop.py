"""Refuses sequences that were taken and can no longer be in time, or whose client has gone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from server.scheduler.drops import Dropped, Expiries, overloaded, timed_out
from server.scheduler.items import SequenceState, StepWork
from server.scheduler.lateness import WALK, PromptPace, prompt_seconds, walk
from server.scheduler.planner import Planner
from server.scheduler.step_time import StepTimeModel
from server.scheduler.waiting import WaitingQueue

UNHURRIED = 3.0
"""Times what it takes alone that a prompt is given whose target is out of reach: it must not make others late, too."""


class LateDrop:
    """Drops whole requests of which no item has had a token or is about to have one."""

    def __init__(
        self,
        waiting: WaitingQueue,
        model: StepTimeModel,
        planner: Planner,
        forget: Callable[[SequenceState], None],
    ) -> None:
        """``forget`` takes an item off the lane; ``planner`` counts and tells."""
        self._waiting = waiting
        self._model = model
        self._planner = planner
        self._forget = forget
        self._expiries = Expiries()
        self._dropped: list[Dropped] = []

    def watch(self, state: SequenceState) -> None:
        """Its client may stop waiting."""
        self._expiries.watch(state)

    def told(self) -> list[Dropped]:
        """What was dropped since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def expire(self, now: float) -> None:
        """Drop those whose clients have gone."""
        for state in self._expiries.expired(now):
            self._drop(state, timed_out, "client's time ran out")

    def look_ahead(self, prompts: list[SequenceState], pace: PromptPace) -> bool:
        """Drop those that must miss their target; true where a longer step might save one that is left.

        ``prompts`` have a slot already and no token yet.
        """
        if not self._model.sure:
            return False
        lateness = walk(self._waiting.ordered(prompts, WALK), pace, self._model)
        for state in lateness.late:
            if not state.gone and not self._hopeless(state):
                self._drop(state, partial(overloaded, drain=lateness.seconds), "dropped late")
        return lateness.tight

    def _drop(self, state: SequenceState, ending: Callable[[list[int]], Dropped], reason: str) -> None:
        request = [one for one in state.request if not one.gone]
        if any(one.started or one.in_flight for one in request):
            return
        self._planner.tally.decisions[reason] += len(request)
        self._dropped.append(ending([one.item.item for one in request]))
        for one in request:
            self._forget(one)

    def _hopeless(self, state: SequenceState) -> bool:
        """Its target is out of reach even with nobody else here: it is served as fast as it goes."""
        model = self._model
        alone = prompt_seconds(state, model) + model.predict(StepWork())
        if alone <= state.aim.ttft:
            return False
        state.firm = False
        self._waiting.postpone(state, state.arrived + UNHURRIED * alone)
        self._planner.tally.decisions["ttft out of reach"] += 1
        self._planner.say(
            "ttft",
            f"a prompt of {state.item.prompt_length} tokens alone takes {alone:.3g} s here, more than the target of "
            f"{state.aim.ttft:.3g} s to the first token: such prompts are served as fast as it goes",
        )
        return True
