"""Latency targets bound the tokens of a step, through the measured time of steps and the slack of the streams."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest

from engines.protocol import Capacity, StepPlan
from server.scheduler.budget import COLD_CHUNK, MIN_CHUNK, SOFT_CHUNK, StepBudget
from server.scheduler.config import SchedulerConfig
from server.scheduler.deadlines import (
    BEST_EFFORT,
    IDLE_STEP,
    SOFT_LAG,
    SOFT_TPOT,
    STEP_SHARE,
    STEPS_TO_TOKEN,
    STRETCH,
    Outlook,
    aim_of,
)
from server.scheduler.items import StepWork
from server.scheduler.step_time import StepTimeModel, add_row, attended_pairs
from tests.unit.scheduler.rig import Rig

LARGE = Capacity(blocks=4000, block_size=16, max_rows=32, max_step_tokens=1024, max_model_len=8000)


def machine(plan: StepPlan) -> float:
    """10 ms a step and 0.1 ms a token."""
    return 0.010 + 1e-4 * sum(row.count for row in plan.rows)


def machine_with_attention(plan: StepPlan) -> float:
    """The same, and 1 us a pair."""
    return machine(plan) + 1e-6 * sum(attended_pairs(row.start, row.count) for row in plan.rows)


def slow_machine(plan: StepPlan) -> float:
    """No step with eight streams takes less than 100 ms."""
    return 10 * machine(plan)


def rig_with_decodes(
    config: SchedulerConfig,
    max_tokens: int = 2000,
    seconds: Callable[[StepPlan], float] = machine,
    **fields: Any,
) -> Rig:
    """Eight residents that decode, after enough steps to know the machine."""
    rig = Rig(config, {"m": LARGE}, seconds)
    for start in range(8):
        rig.offer(rig.item([start] * (20 + 40 * start), max_tokens=max_tokens, **fields))
        for _ in range(3):
            rig.tick()
    for _ in range(30):
        rig.tick()
    while rig.in_flight:
        rig.settle()
    return rig


def chunk(rig: Rig, length: int = 3000, **fields: Any) -> int:
    """Tokens that the next step takes of a long new prompt."""
    rig.offer(rig.item([9] * length, **fields))
    return rig.must_launch().rows[-1].count


def test_a_static_policy_takes_what_the_engine_can_do() -> None:
    assert chunk(rig_with_decodes(SchedulerConfig(policy="static"))) == 1024 - 8
    config = SchedulerConfig(policy="static", token_budget=500, target_tpot=0.02)
    assert chunk(rig_with_decodes(config)) == 500 - 8


@pytest.mark.parametrize("tpot", [0.02, 0.03, 0.05])
def test_target_tpot_bounds_steps_with_decodes(tpot: float) -> None:
    rig = rig_with_decodes(SchedulerConfig(target_tpot=tpot))
    assert chunk(rig) == pytest.approx((tpot - 0.0108) / 1e-4, rel=0.1)
    assert machine(rig.plans[-1]) <= tpot * 1.02
    assert rig.load().token_budget == pytest.approx((tpot - 0.0108) / 1e-4 + 8, rel=0.1)


def test_the_strictest_item_bounds_the_step() -> None:
    rig = rig_with_decodes(SchedulerConfig(target_tpot=0.05))
    rig.offer(rig.item([3] * 20, max_tokens=500, tpot=0.02))
    for _ in range(6):
        rig.tick()
    assert chunk(rig) == pytest.approx((0.02 - 0.0109) / 1e-4, rel=0.1)


def test_without_a_target_steps_are_bounded_but_never_small() -> None:
    assert chunk(rig_with_decodes(SchedulerConfig())) == pytest.approx((STRETCH * SOFT_TPOT - 0.0108) / 1e-4, rel=0.1)
    assert chunk(rig_with_decodes(SchedulerConfig(), seconds=slow_machine)) == SOFT_CHUNK


def lags(rig: Rig) -> list[float]:
    """Seconds that each stream is behind its pace."""
    residents = rig.scheduler._engines["m"].sequences._residents
    return [state.lag(rig.now) for state in residents if state.paced_tokens]


def test_without_a_target_streams_fall_behind_for_a_burst_of_prompts_but_not_for_long() -> None:
    rig = rig_with_decodes(SchedulerConfig())
    for start in range(200):
        rig.offer(rig.item([start] * 1500, max_tokens=1))
    for _ in range(6):
        rig.tick()
    burst = [machine(plan) for plan in rig.plans[-4:]]
    assert min(burst) > 0.09
    for _ in range(100):
        rig.tick()
    sustained = [machine(plan) for plan in rig.plans[-20:]]
    assert sum(sustained) / len(sustained) == pytest.approx(SOFT_TPOT, rel=0.05)
    most = SOFT_LAG[1]
    assert most - 0.1 < max(lags(rig)) < most + 0.1
    assert rig.load().decisions["step bound by backlog"] > 30


def test_without_a_target_streams_fall_behind_no_longer_than_prompts_wait() -> None:
    rig = rig_with_decodes(SchedulerConfig())
    most = 0.0
    for start in range(40):
        rig.offer(rig.item([start] * 1500, max_tokens=1))
    began = rig.now
    while rig.load().waiting:
        rig.tick()
        most = max(most, *lags(rig))
    # Six seconds of prompts, all in full steps, but for what decodes cost: the streams were a second ahead.
    assert 1.5 < most < rig.now - began < 6.8
    # What was lost is not held against those that come next: they see streams at their usual pace.
    for _ in range(4):
        rig.tick()
    assert max(lags(rig)) < SOFT_LAG[0] + 0.1
    rig.offer(rig.item([99] * 1500))
    for _ in range(4):
        rig.tick()
    assert 0.05 < max(machine(plan) for plan in rig.plans[-4:]) <= STRETCH * SOFT_TPOT


def test_a_target_that_was_asked_for_holds_in_a_burst_of_prompts() -> None:
    rig = rig_with_decodes(SchedulerConfig())
    rig.offer(rig.item([3] * 20, max_tokens=500, tpot=0.02))
    for _ in range(6):
        rig.tick()
    for start in range(30):
        rig.offer(rig.item([start] * 1500, max_tokens=1))
    for _ in range(30):
        rig.tick()
    assert max(machine(plan) for plan in rig.plans[-20:]) <= 0.0205


@pytest.mark.parametrize(("priority", "full"), [("normal", True), ("low", False)])
def test_only_prompts_of_no_lower_class_make_streams_fall_behind(priority: str, full: bool) -> None:
    rig = rig_with_decodes(SchedulerConfig())
    for start in range(60):
        rig.offer(rig.item([start] * 1500, max_tokens=1, priority=priority))
    for _ in range(30):
        rig.tick()
    steps = [machine(plan) for plan in rig.plans[-10:]]
    assert (sum(steps) / len(steps) > 0.1) == full


def test_a_burst_of_prompts_without_targets_is_computed_in_full_steps() -> None:
    capacity = Capacity(blocks=12_000, block_size=16, max_rows=256, max_step_tokens=8192, max_model_len=2000)
    # 6 us a token: a full step takes as long as the built-in pace.
    rig = Rig(
        SchedulerConfig(prefix_cache=False),
        {"m": capacity},
        lambda plan: 0.002 + 6e-6 * sum(row.count for row in plan.rows),
    )
    for _ in range(2):  # the first time teaches the step times
        rig.plans.clear()
        for _ in range(256):
            rig.offer(rig.item([1] * 512, max_tokens=16))
        rig.run()
    sizes = [sum(row.count for row in plan.rows) for plan in rig.plans]
    assert sizes[:16] == [8192] * 16
    rig.check_all()


def test_target_tpot_counts_the_context_of_decodes() -> None:
    rig = rig_with_decodes(SchedulerConfig(target_tpot=0.04), max_tokens=7000, seconds=machine_with_attention)
    for _ in range(2000):
        rig.tick()
    # Eight decodes at some 2200 tokens take 28 ms, which leaves little for a prompt.
    assert MIN_CHUNK < chunk(rig) < 120
    assert machine_with_attention(rig.plans[-1]) == pytest.approx(0.04, rel=0.1)


def test_target_tpot_holds_back_nothing_where_nobody_decodes() -> None:
    rig = rig_with_decodes(SchedulerConfig(target_tpot=0.02))
    rig.cancel(*rig.streams)
    # First no more than predictions are trusted for, then all.
    first = chunk(rig)
    assert 256 < first < 1024
    rig.settle()
    assert rig.must_launch().rows[0].count == 1024


def test_a_target_that_cannot_be_met_is_told_once_and_starves_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rig = rig_with_decodes(SchedulerConfig(target_tpot=0.001), max_tokens=100)
        assert chunk(rig, length=500) == MIN_CHUNK
        rig.run()
    rig.check_all()
    assert rig.load().decisions["tpot out of reach"] > 30
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "target of 1 ms" in caplog.text


def test_target_ttft_keeps_every_step_short_enough_for_the_next_arrival() -> None:
    rig = rig_with_decodes(SchedulerConfig(target_ttft=0.12))
    # 10.8 ms for the decodes, of which 10 ms are lost in every step.
    step = math.sqrt((0.0108 + 0.010) / 2 * 0.12 / STEPS_TO_TOKEN)
    assert step < 0.12 * STEP_SHARE
    assert chunk(rig, length=300) == pytest.approx((step - 0.0108) / 1e-4, rel=0.1)


def test_slack_of_the_streams_is_used_where_it_saves_a_first_token() -> None:
    config = SchedulerConfig(target_tpot=0.02, target_ttft=1.0)
    easy = chunk(rig_with_decodes(config), length=200)
    assert easy == pytest.approx((0.02 - 0.0108) / 1e-4, rel=0.1)
    # The streams ran at 11 ms a token for a while, so they can take a longer step.
    urgent = chunk(rig_with_decodes(config), waited=0.92, length=290)
    assert urgent == pytest.approx((STRETCH * 0.02 - 0.0108) / 1e-4, rel=0.1)
    # One that is hopeless anyway must not spoil the others' rhythm for long: their slack is soon used up.
    rig = rig_with_decodes(config)
    rig.offer(rig.item([9] * 7000, waited=2.0))
    for _ in range(60):
        rig.tick()
    assert machine(rig.plans[-1]) <= 0.0205


def test_a_step_ends_in_time_for_the_prompt_that_is_complete_with_it() -> None:
    rig = rig_with_decodes(SchedulerConfig(target_tpot=0.1))
    # It may have come while the loop waited for the last two steps, 11 ms each.
    rig.offer(rig.item([9] * 150, ttft=0.065))
    rig.offer(rig.item([8] * 3000))
    assert machine(rig.must_launch()) == pytest.approx(0.043, abs=0.002)


def test_a_stream_that_fell_behind_gets_its_pace_back_before_prompts_get_time() -> None:
    rig = rig_with_decodes(SchedulerConfig(target_tpot=0.02))
    rig.now += 0.6
    least = chunk(rig)
    assert least == MIN_CHUNK
    for _ in range(200):
        rig.tick()
    assert max(row.count for plan in rig.plans[-200:] for row in plan.rows) > 2 * MIN_CHUNK


def test_before_anything_is_measured_a_bounded_step_is_small() -> None:
    rig = Rig(SchedulerConfig(target_ttft=0.2), {"m": LARGE}, machine)
    assert chunk(rig) == COLD_CHUNK


def test_time_in_the_queue_does_not_make_the_batch_smaller() -> None:
    plans = []
    for waited in (0.0, 0.3):
        rig = rig_with_decodes(SchedulerConfig(target_tpot=0.03))
        plans.append(chunk(rig, waited=waited))
    assert plans[0] <= plans[1]


@pytest.mark.parametrize("jump", [3600.0, -50.0])
def test_a_clock_that_jumps_disturbs_nothing_for_long(jump: float) -> None:
    rig = rig_with_decodes(SchedulerConfig(target_tpot=0.03))
    rig.now += jump
    for _ in range(20):
        rig.tick()
    assert chunk(rig) == pytest.approx((0.03 - 0.0108) / 1e-4, rel=0.1)
    rig.run()
    rig.check_all()


def test_a_model_two_times_wrong_costs_no_stream_its_pace() -> None:
    rig = rig_with_decodes(SchedulerConfig(target_tpot=0.03))
    rig._seconds = lambda plan: 2 * machine(plan)
    for start in range(20):
        rig.offer(rig.item([start] * 200, max_tokens=20))
        for _ in range(8):
            rig.tick()
    late = rig.plans[-40:]
    assert max(2 * machine(plan) for plan in late) <= 0.031


class TestAims:
    def aim(self, config: SchedulerConfig, length: int = 10, **fields: Any) -> tuple[float, float, bool]:
        aim = aim_of(Rig().item(range(length), **fields), config)
        return aim.ttft, aim.tpot, aim.firm

    def test_an_items_own_target_goes_before_the_operators(self) -> None:
        config = SchedulerConfig(target_ttft=2.0, target_tpot=0.1)
        assert self.aim(config) == (2.0, 0.1, False)
        assert self.aim(config, ttft=0.5, tpot=0.01, firm=True) == (0.5, 0.01, True)

    def test_without_any_nothing_is_firm(self) -> None:
        assert self.aim(SchedulerConfig(), firm=True) == (1.0, SOFT_TPOT, False)
        assert self.aim(SchedulerConfig(), length=8000) == (2.0, SOFT_TPOT, False)


class TestOutlook:
    def check(self, outlook: Outlook, arguments: tuple[float, float, float, bool], seconds: float, bound: str) -> None:
        given, reason = outlook.seconds(*arguments)
        assert given == pytest.approx(seconds, rel=0.005)
        assert reason == bound

    def test_nobody_decodes(self) -> None:
        self.check(Outlook(), (0.1, 0.1, 1.0, True), IDLE_STEP, "idle")
        self.check(Outlook(ttft=0.4), (0.1, 0.1, 1.0, True), 0.4 * STEP_SHARE, "idle")
        self.check(Outlook(ttft=0.5), (0.003, 0.001, 1.0, True), 0.0183, "idle")

    def test_bounds_and_their_reasons(self) -> None:
        easy = Outlook(slack=1.0, tpot=0.05)
        self.check(easy, (0.01, 0.0, 1.25, False), 0.04, "pace")
        self.check(easy, (0.01, 0.0, 1.25, True), STRETCH * 0.04, "stretch")
        late = Outlook(slack=0.03, tpot=0.05)
        self.check(late, (0.01, 0.0, 1.0, True), 0.03, "slack")
        self.check(late, (0.03, 0.0, 1.0, True), 0.03 * BEST_EFFORT, "behind")
        self.check(Outlook(slack=-9.0, tpot=0.05), (0.01, 0.0, 1.0, True), 0.01 * BEST_EFFORT, "behind")

    @pytest.mark.parametrize(
        ("wait", "lag", "step", "bound"),
        [
            (0.1, SOFT_LAG[0], STRETCH * SOFT_TPOT, "pace"),
            (0.6, 0.6, 0.6 * STEP_SHARE, "backlog"),
            (9.0, SOFT_LAG[1], IDLE_STEP, "backlog"),
        ],
    )
    def test_streams_without_a_target_bear_what_prompts_bear(
        self, wait: float, lag: float, step: float, bound: str
    ) -> None:
        outlook = Outlook()
        outlook.bear(0.04, wait)
        assert (outlook.lag, outlook.slack) == (lag, 0.04 + lag)
        self.check(outlook, (0.01, 0.0, 1.0, False), step, bound)
        asked = Outlook(slack=0.03, tpot=0.05)
        asked.bear(0.04, wait)
        self.check(asked, (0.01, 0.0, 1.0, False), 0.03, "slack")


class TestBudget:
    def model(self) -> StepTimeModel:
        model = StepTimeModel()
        for tokens in (1, 8, 64, 300, 500, 20, 100) * 10:
            work = StepWork()
            add_row(work, tokens * 3, tokens)
            pairs = work.decode_pairs + work.prompt_pairs
            model.observe(work, 0.01 + 1e-4 * tokens + 1e-8 * pairs)
        return model

    def budget(self, tokens: int, seconds: float, floor: int = 0) -> StepBudget:
        return StepBudget(StepWork(), tokens, seconds, floor, self.model())

    def test_rows_share_tokens(self) -> None:
        budget = self.budget(100, math.inf)
        assert [budget.take(0, 60), budget.take(0, 60), budget.take(0, 60)] == [60, 40, 0]
        assert not budget.open

    def test_rows_share_seconds_and_the_floor(self) -> None:
        budget = self.budget(1000, 0.03, MIN_CHUNK)
        first = budget.take(0, 100)
        assert first == 100
        assert budget.take(0, 1000) == pytest.approx(100, rel=0.1)
        assert budget.take(0, 1000) <= 1
        late = self.budget(1000, -0.5, MIN_CHUNK)
        assert [late.take(0, 20), late.take(0, 20), late.take(0, 20)] == [20, MIN_CHUNK - 20, 0]

    def test_a_long_context_makes_tokens_dearer(self) -> None:
        assert self.budget(10_000, 0.1).take(50_000, 5000) < 0.5 * self.budget(10_000, 0.1).take(0, 5000)

    def test_a_deadline_binds_only_where_it_can_be_kept(self) -> None:
        budget = self.budget(1000, 0.1)
        budget.take(0, 100)
        budget.end_by(0.015)
        assert budget.limit() > 500
        budget.end_by(0.03)
        assert budget.limit() == pytest.approx(100, rel=0.1)

    def test_a_step_that_is_short_of_time_just_fills_a_captured_graph(self) -> None:
        def limit(seconds: float, floor: int = 0, decodes: int = 0) -> int:
            work = StepWork(rows=decodes, tokens=decodes)
            return StepBudget(work, 5000, seconds, floor, self.model(), (64, 256, 512)).limit()

        assert [limit(0.03), limit(0.04)] == [64, 256]
        assert limit(0.04, decodes=40) == 216
        assert limit(0.012) == 0
        assert limit(0.012, MIN_CHUNK) == MIN_CHUNK
        # Larger ones are computed as they are.
        assert limit(0.08) == pytest.approx(700, rel=0.05)

    def test_rows_share_a_captured_graph(self) -> None:
        budget = StepBudget(StepWork(rows=8, tokens=8), 5000, 0.03, 0, self.model(), (64, 256))
        assert [budget.take(0, 40), budget.take(0, 40), budget.take(0, 40)] == [40, 16, 0]
        assert budget.cut == "time"

    def test_predictions_are_trusted_near_what_was_seen_only(self) -> None:
        assert self.budget(100_000, 100.0).limit() == 4 * 500
        assert self.budget(100_000, math.inf).limit() == 100_000
