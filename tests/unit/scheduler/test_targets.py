"""Latency targets bound the tokens of a step, through the measured time of steps and the slack of the streams."""

from __future__ import annotations

import logging
import math

import pytest

from server.scheduler.budget import COLD_CHUNK, MIN_CHUNK
from server.scheduler.config import SchedulerConfig
from server.scheduler.deadlines import STEP_SHARE, STEPS_TO_TOKEN, STRETCH
from tests.unit.scheduler.decoding_rig import LARGE, chunk, machine, machine_with_attention, rig_with_decodes
from tests.unit.scheduler.rig import Rig


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
