"""Streams without a target bear a burst of prompts, and no longer than prompts wait."""

from __future__ import annotations

import pytest

from engines.protocol import Capacity
from server.scheduler.budget import SOFT_CHUNK
from server.scheduler.config import SchedulerConfig
from server.scheduler.deadlines import SOFT_DECODES, SOFT_LAG, SOFT_TPOT, STRETCH, WAIT_SHARE
from tests.unit.scheduler.decoding_rig import chunk, machine, rig_with_decodes, slow_machine
from tests.unit.scheduler.rig import Rig


def test_without_a_target_steps_are_bounded_but_never_small() -> None:
    def within(seconds: float) -> object:
        return pytest.approx((seconds - 0.0108) / 1e-4, rel=0.1)

    assert chunk(rig_with_decodes(SchedulerConfig()), length=1000) == within(0.0108 / SOFT_DECODES)
    # More tokens wait longer, and a step may take its share of that.
    assert chunk(rig_with_decodes(SchedulerConfig()), length=3000) == within(3000 * 1e-4 * WAIT_SHARE)
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
