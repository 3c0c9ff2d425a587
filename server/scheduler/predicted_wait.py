"""How long a request that comes now would wait for its first step: what the door refuses by."""

from __future__ import annotations

from collections.abc import Sequence

from server.scheduler.items import SequenceState
from server.scheduler.lateness import PromptPace, prompt_seconds
from server.scheduler.residents import Residents
from server.scheduler.step_time import StepTimeModel


def predicted_wait(
    waiting: Sequence[SequenceState],
    residents: Residents,
    slots_are_short: bool,
    pace: PromptPace,
    model: StepTimeModel,
) -> float:
    """Seconds until all prompts of now are computed and, where slots are short, enough streams have ended.

    Each step gives every stream one token, so by Little's law one of them ends every ``output / streams`` steps. The
    rate at which streams ended of late says less: it is that of the load which was, and streams that wait for slots
    leave the device to those that have one, whose steps are then short.
    """
    prompts = [*waiting, *(state for state in residents if not state.paced_tokens)]
    work = sum(prompt_seconds(state, model) for state in prompts)
    served = work / pace.share + pace.alone
    ends = len(waiting) + 1 - (0 if slots_are_short else residents.free_slots)
    if ends <= 0 or not len(residents):
        return served
    steps = ends * residents.typical_output() / len(residents)
    return max(served, work + steps * pace.alone)
