"""Which first tokens will be late: the queue is served in thought, at the pace that the residents leave.

Refusing late is better than at arrival (the prediction is short, so it is right) and far better than never: a prompt
that misses its deadline has cost what the next one needed for its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from server.scheduler.items import SequenceState
from server.scheduler.step_time import StepTimeModel, attended_pairs

WALK = 256
"""Items looked at in one plan; those behind them have time."""
LEAST_SHARE = 0.1
"""Prompts get at least this share of the device, however many decode."""
EASY = 0.7
"""Share of the time to its deadline beyond which a first token counts as tight ..."""
LOST = 2.0
"""... and beyond which no longer step could save it."""


@dataclass(frozen=True, slots=True)
class PromptPace:
    """How fast prompts are computed beside the decodes of now."""

    start: float
    """When the next step begins on the device."""
    alone: float
    """Seconds of a step without prompts."""
    share: float
    """Part of the device's time that prompts get."""
    safety: float

    @classmethod
    def beside(cls, start: float, alone: float, tpot: float, safety: float) -> PromptPace:
        """``tpot`` is the least target of the decodes; infinite where there are none."""
        return cls(start, alone, max(LEAST_SHARE, 1 - alone * safety / tpot), safety)


@dataclass(slots=True)
class Lateness:
    """What the walk found."""

    late: list[SequenceState]
    """Firm items that must miss their deadline."""
    tight: bool = False
    """A longer step might save a first token for which somebody asked for a target."""
    seconds: float = 0.0
    """Device time of all that was walked over, decodes beside it counted in."""


def prompt_seconds(state: SequenceState, model: StepTimeModel) -> float:
    """Device time of what is still to be computed of a prompt, in steps that are not on the floor."""
    start = max(state.computed, state.known_hit)
    count = len(state.tokens) - start
    return model.added(count, attended_pairs(start, count))


def walk(queue: Iterable[SequenceState], pace: PromptPace, model: StepTimeModel) -> Lateness:
    """Serve the queue in thought. An item that is late is left out, so those behind it may be in time."""
    found = Lateness([])
    busy = 0.0
    for state in queue:
        work = prompt_seconds(state, model)
        takes = ((busy + work) / pace.share + pace.alone) * pace.safety
        left = state.deadline - pace.start
        if EASY * left < takes < LOST * left and state.aim.asked_ttft:
            found.tight = True
        if takes > left and state.firm and not state.started:
            found.late.append(state)
        else:
            busy += work
    found.seconds = busy / pace.share
    return found
