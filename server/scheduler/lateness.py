"""Which first tokens will be late: the queue is served in thought, at the pace that the residents leave.

Refusing late is better than at arrival (the prediction is short, so it is right) and far better than never: a prompt
that misses its deadline has cost what the next one needed for its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

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
SURELY = 0.75
"""Share of its predicted time that a first token takes at least: others before it may be dropped, or take less."""


@dataclass(slots=True)
class PromptPace:
    """How fast prompts are computed beside the decodes of now."""

    start: float
    """When the next step begins on the device."""
    alone: float
    """Seconds of a step without prompts."""
    step: float
    """Seconds of a step with as many prompt tokens as it may have."""
    safety: float = 1.0
    """Factor that makes the prediction of one step safe ..."""
    bias: float = 1.0
    """... and by which steps are off on average."""
    share: float = field(init=False)
    """Part of the device's time that prompts get."""

    def __post_init__(self) -> None:
        self.share = max(LEAST_SHARE, 1 - self.alone * self.safety / self.step) if self.step else 1.0

    def takes(self, work: float) -> float:
        """Seconds in which, almost surely, so many seconds of prompts are computed.

        Steps deviate each for itself: of n in a row the whole is off by a share smaller by the root of n.
        """
        seconds = work / self.share + self.alone
        single = seconds if seconds < self.step else self.step
        return seconds * self.bias + (self.safety - self.bias) * math.sqrt(seconds * single)


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
    """Serve the queue in thought. An item that is late is left out, so those behind it may be in time.

    It is late for good where its turn has come, or where it surely is; until then it costs nothing to wait and see.
    """
    found = Lateness([])
    busy = hoped = 0.0
    for state in queue:
        work = prompt_seconds(state, model)
        takes = pace.takes(busy + work)
        left = state.deadline - pace.start
        if EASY * left < takes < LOST * left and state.aim.asked_ttft:
            found.tight = True
        if takes <= left or not state.firm or state.started:
            busy += work
        elif busy < pace.step or SURELY * pace.takes(busy + hoped + work) > left:
            found.late.append(state)
        else:
            hoped += work
    found.seconds = busy / pace.share
    return found
