"""How sure a prediction of many steps is, beside that of one."""

from __future__ import annotations

import math

import pytest

from server.scheduler.lateness import LEAST_SHARE, PromptPace


def pace(safety: float = 1.2, bias: float = 1.0, alone: float = 0.0, step: float = 0.02) -> PromptPace:
    return PromptPace(0.0, alone, step, safety, bias)


def test_one_step_has_the_whole_margin_and_many_steps_little_of_it() -> None:
    assert pace().takes(0.01) == pytest.approx(0.012)
    assert pace().takes(0.02) == pytest.approx(0.024)
    assert pace().takes(2.0) == pytest.approx(2.0 + 0.2 * 2.0 / math.sqrt(100))


def test_what_steps_are_off_on_average_does_not_level_out() -> None:
    assert pace(bias=1.2).takes(2.0) == pytest.approx(2.4)


def test_decodes_take_their_part_of_every_step() -> None:
    beside = pace(safety=1.0, alone=0.005)
    assert beside.share == pytest.approx(0.75)
    assert beside.takes(0.3) == pytest.approx(0.4 + 0.005)
    assert pace(alone=0.5).share == LEAST_SHARE
    assert pace(step=0.0).share == 1.0
