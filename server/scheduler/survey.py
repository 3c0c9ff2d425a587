"""What the residents want of the next step: the decodes that must be in it, and the prompts in the making."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from server.scheduler.deadlines import Outlook
from server.scheduler.items import SequenceState, StepWork
from server.scheduler.step_time import StepTimeModel


@dataclass(slots=True)
class Survey:
    """What one step is planned from."""

    start: float
    """When it begins on the device."""
    decodes: list[SequenceState] = field(default_factory=list)
    """By seniority."""
    prompts: list[SequenceState] = field(default_factory=list)
    work: StepWork = field(default_factory=StepWork)
    """Of the decodes."""
    alone: float = 0.0
    """Predicted seconds of the decodes."""
    outlook: Outlook = field(default_factory=Outlook)


def survey_of(residents: Iterable[SequenceState], model: StepTimeModel, start: float) -> Survey:
    """``residents`` by seniority; ``start`` is when the next step begins on the device."""
    survey = Survey(start)
    decodes, outlook = survey.decodes, survey.outlook
    pairs = 0
    least = math.inf
    for state in residents:
        pending = min(len(state.tokens) + state.in_flight, state.goal) - state.computed
        if pending == 0 or state.suspect:
            continue
        if pending > 1 or (not state.paced_tokens and not state.in_flight):
            survey.prompts.append(state)
            continue
        decodes.append(state)
        pairs += state.computed + 1
        aim = state.aim
        least = min(least, state.due() + aim.lag)
        outlook.tpot = min(outlook.tpot, aim.step)
        outlook.asked = outlook.asked or aim.asked_tpot
        if aim.asked_ttft:
            outlook.ttft = min(outlook.ttft, aim.ttft)
    outlook.slack = least - start
    survey.work = StepWork(rows=len(decodes), tokens=len(decodes), decode_pairs=pairs)
    survey.alone = model.predict(survey.work)
    return survey
