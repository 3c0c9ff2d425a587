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
    tpot = ttft = math.inf
    # The longest loop of a plan: it makes no calls.
    for state in residents:
        computed = state.computed
        known, goal = len(state.tokens) + state.in_flight, state.goal
        pending = (known if known < goal else goal) - computed
        if pending == 0 or state.suspect:
            continue
        paced = state.paced_tokens
        if pending > 1 or (not paced and not state.in_flight):
            survey.prompts.append(state)
            continue
        decodes.append(state)
        pairs += computed + 1
        aim = state.aim
        if paced:
            # What ``state.due`` gives.
            due = state.paced_from + (known + 1 - paced) * aim.pace + aim.lag
            if due < least:
                least = due
        if aim.step < tpot:
            tpot = aim.step
        if aim.asked_tpot:
            outlook.asked = True
        if aim.asked_ttft and aim.ttft < ttft:
            ttft = aim.ttft
    outlook.slack, outlook.tpot, outlook.ttft = least - start, tpot, ttft
    survey.work = StepWork(rows=len(decodes), tokens=len(decodes), decode_pairs=pairs)
    survey.alone = model.predict(survey.work)
    return survey
