"""Latency targets bound the tokens of a step, through the measured time of steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from engines.protocol import Capacity, StepPlan
from server.scheduler.config import SchedulerConfig
from server.scheduler.deadlines import COLD_CHUNK, MIN_CHUNK, STEP_SHARE, OldestPrompt, StepBudget, Targets
from server.scheduler.step_time import StepTimeModel, attended_pairs
from tests.unit.scheduler.rig import Rig

LARGE = Capacity(blocks=4000, block_size=16, max_rows=32, max_step_tokens=1024, max_model_len=8000)


def machine(plan: StepPlan) -> float:
    """10 ms a step and 0.1 ms a token."""
    return 0.010 + 1e-4 * sum(row.count for row in plan.rows)


def machine_with_attention(plan: StepPlan) -> float:
    """The same, and 1 us a pair."""
    return machine(plan) + 1e-6 * sum(attended_pairs(row.start, row.count) for row in plan.rows)


def rig_with_decodes(
    config: SchedulerConfig, max_tokens: int = 2000, seconds: Callable[[StepPlan], float] = machine
) -> Rig:
    """Eight residents that decode, after enough steps to know the machine."""
    rig = Rig(config, {"m": LARGE}, seconds)
    for start in range(8):
        rig.offer(rig.item([start] * (20 + 40 * start), max_tokens=max_tokens))
        for _ in range(3):
            rig.tick()
    for _ in range(30):
        rig.tick()
    while rig.in_flight:
        rig.settle()
    return rig


def chunk(rig: Rig, waited: float = 0.0, length: int = 3000) -> int:
    """Tokens that the next step takes of a long new prompt."""
    rig.offer(rig.item([9] * length, waited=waited))
    return rig.must_launch().rows[-1].count


def test_without_a_target_a_prompt_takes_what_the_engine_can_do() -> None:
    assert chunk(rig_with_decodes(SchedulerConfig())) == 1024 - 8


@pytest.mark.parametrize("tpot", [0.02, 0.03, 0.05])
def test_target_tpot_bounds_steps_with_decodes(tpot: float) -> None:
    rig = rig_with_decodes(SchedulerConfig(target_tpot=tpot))
    assert chunk(rig) == pytest.approx((tpot - 0.0108) / 1e-4, rel=0.1)
    assert machine(rig.plans[-1]) <= tpot * 1.02
    assert rig.load().token_budget == pytest.approx((tpot - 0.0108) / 1e-4 + 8, rel=0.1)


def test_target_tpot_counts_the_context_of_decodes() -> None:
    rig = rig_with_decodes(SchedulerConfig(target_tpot=0.04), max_tokens=7000, seconds=machine_with_attention)
    for _ in range(2000):
        rig.tick()
    # Eight decodes at some 2200 tokens take 28 ms, which leaves little for a prompt.
    assert MIN_CHUNK < chunk(rig) < 120
    assert machine_with_attention(rig.plans[-1]) == pytest.approx(0.04, rel=0.05)


def test_target_tpot_holds_back_nothing_where_nobody_decodes() -> None:
    rig = rig_with_decodes(SchedulerConfig(target_tpot=0.02))
    rig.cancel(*rig.streams)
    assert chunk(rig) == 1024


def test_a_target_that_cannot_be_met_starves_no_prompt() -> None:
    rig = rig_with_decodes(SchedulerConfig(target_tpot=0.001), max_tokens=100)
    assert chunk(rig, length=500) == MIN_CHUNK
    rig.run()
    rig.check_all()


def test_target_ttft_keeps_every_step_short_enough_for_the_next_arrival() -> None:
    rig = rig_with_decodes(SchedulerConfig(target_ttft=0.2))
    assert chunk(rig) == pytest.approx((0.2 * STEP_SHARE - 0.0108) / 1e-4, rel=0.1)


def test_target_ttft_widens_the_step_for_a_prompt_that_would_be_late() -> None:
    config = SchedulerConfig(target_tpot=0.02, target_ttft=1.0)
    easy = chunk(rig_with_decodes(config), length=500)
    assert easy == pytest.approx((0.02 - 0.0108) / 1e-4, rel=0.1)
    urgent = chunk(rig_with_decodes(config), waited=0.9, length=500)
    assert urgent == pytest.approx((0.04 - 0.0108) / 1e-4, rel=0.1)
    # One that is late already must not spoil the others' rhythm.
    assert chunk(rig_with_decodes(config), waited=2.0, length=500) == easy


def test_before_anything_is_measured_a_bounded_step_is_small() -> None:
    rig = Rig(SchedulerConfig(target_ttft=0.2), {"m": LARGE}, machine)
    assert chunk(rig) == COLD_CHUNK


def test_time_in_the_queue_does_not_change_the_batch() -> None:
    plans = []
    for waited in (0.0, 0.3):
        rig = rig_with_decodes(SchedulerConfig(target_tpot=0.03))
        rig.now += waited
        plans.append(chunk(rig, waited=waited))
    assert plans[0] == plans[1]


class TestBudget:
    def model(self) -> StepTimeModel:
        model = StepTimeModel()
        for tokens in (1, 8, 64, 300, 500, 20, 100) * 4:
            pairs = attended_pairs(tokens * 3, tokens)
            model.observe(tokens, pairs, 0.01 + 1e-4 * tokens + 1e-8 * pairs)
        return model

    def test_rows_share_tokens(self) -> None:
        budget = StepBudget(100, math.inf, self.model())
        assert [budget.take(0, 60), budget.take(0, 60), budget.take(0, 60)] == [60, 40, 0]
        assert not budget.open

    def test_rows_share_seconds_and_the_floor(self) -> None:
        budget = StepBudget(1000, 0.02, self.model())
        first = budget.take(0, 100)
        assert first == 100
        assert budget.take(0, 1000) == pytest.approx(100, rel=0.1)
        assert budget.take(0, 1000) <= 1
        late = StepBudget(1000, -0.5, self.model())
        assert [late.take(0, 20), late.take(0, 20), late.take(0, 20)] == [20, MIN_CHUNK - 20, 0]

    def test_a_long_context_makes_tokens_dearer(self) -> None:
        assert StepBudget(10_000, 0.1, self.model()).take(50_000, 5000) < 0.5 * StepBudget(
            10_000, 0.1, self.model()
        ).take(0, 5000)

    def test_no_target_no_bound(self) -> None:
        prompt = OldestPrompt(0, 100, 0.0)
        bound = Targets(None, None).step_seconds(decodes=4, base=0.1, prompt=prompt, now=1.0, model=self.model())
        assert bound == math.inf
