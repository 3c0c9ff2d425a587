"""Tokens and seconds of one step, shared by its rows."""

from __future__ import annotations

import math

import pytest

from server.scheduler.budget import MIN_CHUNK, StepBudget
from server.scheduler.items import StepWork
from server.scheduler.step_time import StepTimeModel, add_row


def known_machine() -> StepTimeModel:
    model = StepTimeModel()
    for tokens in (1, 8, 64, 300, 500, 20, 100) * 10:
        work = StepWork()
        add_row(work, tokens * 3, tokens)
        pairs = work.decode_pairs + work.prompt_pairs
        model.observe(work, 0.01 + 1e-4 * tokens + 1e-8 * pairs)
    return model


def budget_of(tokens: int, seconds: float, floor: int = 0) -> StepBudget:
    return StepBudget(StepWork(), tokens, seconds, floor, known_machine())


def test_rows_share_tokens() -> None:
    budget = budget_of(100, math.inf)
    assert [budget.take(0, 60), budget.take(0, 60), budget.take(0, 60)] == [60, 40, 0]
    assert not budget.open


def test_rows_share_seconds_and_the_floor() -> None:
    budget = budget_of(1000, 0.03, MIN_CHUNK)
    first = budget.take(0, 100)
    assert first == 100
    assert budget.take(0, 1000) == pytest.approx(100, rel=0.1)
    assert budget.take(0, 1000) <= 1
    late = budget_of(1000, -0.5, MIN_CHUNK)
    assert [late.take(0, 20), late.take(0, 20), late.take(0, 20)] == [20, MIN_CHUNK - 20, 0]


def test_a_long_context_makes_tokens_dearer() -> None:
    assert budget_of(10_000, 0.1).take(50_000, 5000) < 0.5 * budget_of(10_000, 0.1).take(0, 5000)


def test_a_deadline_binds_only_where_it_can_be_kept() -> None:
    budget = budget_of(1000, 0.1)
    budget.take(0, 100)
    budget.end_by(0.015)
    assert budget.limit() > 500
    budget.end_by(0.03)
    assert budget.limit() == pytest.approx(100, rel=0.1)


def test_a_step_that_is_short_of_time_just_fills_a_captured_graph() -> None:
    def limit(seconds: float, floor: int = 0, decodes: int = 0) -> int:
        work = StepWork(rows=decodes, tokens=decodes)
        return StepBudget(work, 5000, seconds, floor, known_machine(), (64, 256, 512)).limit()

    assert [limit(0.03), limit(0.04)] == [64, 256]
    assert limit(0.04, decodes=40) == 216
    assert limit(0.012) == 0
    assert limit(0.012, MIN_CHUNK) == MIN_CHUNK
    # Larger ones are computed as they are.
    assert limit(0.08) == pytest.approx(700, rel=0.05)


def test_rows_share_a_captured_graph() -> None:
    budget = StepBudget(StepWork(rows=8, tokens=8), 5000, 0.03, 0, known_machine(), (64, 256))
    assert [budget.take(0, 40), budget.take(0, 40), budget.take(0, 40)] == [40, 16, 0]
    assert budget.cut == "time"


@pytest.mark.parametrize(
    ("wanted", "decodes", "tokens"),
    [
        (300, 8, 248),  # 256 and then 64 take 52 ms together, 512 take 61
        (500, 8, 500),  # 512, whatever is left out
        (256, 0, 256),
        (60, 8, 56),
        (600, 8, 600),  # larger than all graphs: nothing is padded
        (40, 8, 40),
        (30, 70, 30),  # decodes alone fill the smaller graph
    ],
)
def test_what_fills_a_graph_in_part_only_is_left_to_the_next_step(wanted: int, decodes: int, tokens: int) -> None:
    budget = StepBudget(StepWork(rows=decodes, tokens=decodes), 5000, math.inf, 0, known_machine(), (64, 256, 512))
    budget.fill_graph(wanted)
    assert budget.take(0, wanted) == tokens
    assert budget.cut == ("padding" if tokens < wanted else "")


def test_predictions_are_trusted_near_what_was_seen_only() -> None:
    assert budget_of(100_000, 100.0).limit() == 4 * 500
    assert budget_of(100_000, math.inf).limit() == 100_000
