"""What the residents want of the next step: the decodes that must be in it, and the prompts in the making."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from server.scheduler.deadlines import Outlook
from server.scheduler.items import SequenceState, StepWork
from server.scheduler.step_time import StepTimeModel
from server.scheduler.waiting import WaitingQueue


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


def survey_of(residents: Iterable[SequenceState], waiting: WaitingQueue, model: StepTimeModel, start: float) -> Survey:
    """``residents`` by seniority; ``start`` is when the next step begins on the device."""
    survey = Survey(start)
    decodes, outlook = survey.decodes, survey.outlook
    pairs = 0
    least = soft = math.inf
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
        # What ``state.due`` gives.
        due = state.paced_from + (known + 1 - paced) * aim.pace if paced else math.inf
        if aim.asked_tpot:
            if due < least:
                least = due
            if aim.tpot < tpot:
                tpot = aim.tpot
        elif due < soft:
            soft = due
        if aim.asked_ttft and aim.ttft < ttft:
            ttft = aim.ttft
    outlook.slack, outlook.tpot, outlook.ttft, outlook.asked = least - start, tpot, ttft, tpot < math.inf
    survey.work = StepWork(rows=len(decodes), tokens=len(decodes), decode_pairs=pairs)
    survey.alone = model.predict(survey.work)
    rank = next((state.rank for state in decodes if not state.aim.asked_tpot), None)
    if rank is not None:
        outlook.bear(soft - start, _prompts_wait(survey.prompts, waiting, rank, model, start), survey.alone)
    return survey


def _prompts_wait(
    prompts: Iterable[SequenceState], waiting: WaitingQueue, rank: int, model: StepTimeModel, start: float
) -> float:
    """Seconds from arrival to first token of the prompt that waits longest, of this class and higher ones.

    ``prompts`` have a slot already.
    """
    tokens, since = waiting.backlog(rank)
    for state in prompts:
        if state.rank <= rank:
            tokens += state.pending
            if not state.started:
                since = min(since, state.arrived)
    return max(0.0, start - since) + model.added(tokens, 0.0)
