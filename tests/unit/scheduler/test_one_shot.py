"""Items that end after one step. The rig's engine takes 8 rows."""

from __future__ import annotations

import logging
import random

import pytest

from engines.protocol import Capacity, StepPlan
from server.scheduler.config import SchedulerConfig
from server.scheduler.law import Law
from server.scheduler.one_shot import MAX_BUCKETS, OneShotLane
from tests.unit.scheduler.rig import Rig


def batches(rig: Rig) -> list[list[int]]:
    """Requests in each step, by their number."""
    return [[row.item // 1000 for row in plan.one_shot] for plan in rig.plans]


def offer(rig: Rig, *shapes: tuple[int, int]) -> None:
    """One request for each (bucket, rows)."""
    for bucket, rows in shapes:
        rig.offer(rig.one_shot(bucket, rows))


def test_a_lone_item_runs_at_once_and_holds_nothing() -> None:
    rig = Rig()
    offer(rig, (0, 3))
    plan = rig.must_launch()
    assert (plan.rows, plan.admits, plan.graph_rows) == ((), (), 0)
    load = rig.load()
    assert (load.running, load.waiting, load.blocks_used) == (1, 0, 0)
    rig.run()
    rig.check_all()
    assert rig.scheduler.settled_work.rows == 3


def test_only_equal_buckets_share_a_step_and_the_earliest_head_goes_first() -> None:
    rig = Rig()
    offer(rig, (1, 2), (0, 2), (1, 2), (0, 1), (1, 1))
    rig.run()
    assert batches(rig) == [[1, 3, 5], [2, 4]]
    rig.check_all()


def test_a_step_holds_no_more_rows_than_it_can() -> None:
    rig = Rig()
    offer(rig, (0, 4), (0, 3), (0, 2), (0, 1))
    rig.run()
    # Strictly in order: the last one would have fitted into the first step.
    assert batches(rig) == [[1, 2], [3, 4]]
    rig = Rig(SchedulerConfig(max_batch=5))
    offer(rig, (0, 4), (0, 1), (0, 1))
    rig.run()
    assert batches(rig) == [[1, 2], [3]]


def test_an_item_waits_for_company_but_no_longer_than_the_delay() -> None:
    rig = Rig(SchedulerConfig(max_delay=0.005))
    offer(rig, (0, 1))
    assert rig.launch() is None
    assert rig.scheduler.due() == rig.now + 0.005
    rig.now += 0.004
    offer(rig, (0, 1))
    assert rig.launch() is None
    rig.now = rig.scheduler.due() or 0.0
    rig.must_launch()
    assert batches(rig) == [[1, 2]]
    assert rig.scheduler.due() is None
    rig.run()
    assert [stream.updates[0].queue_seconds for stream in rig.streams.values()] == [
        pytest.approx(0.005),
        pytest.approx(0.001),
    ]


@pytest.mark.parametrize("jump", [3600.0, -50.0])
def test_a_clock_that_jumps_keeps_nobody_waiting(jump: float) -> None:
    rig = Rig(SchedulerConfig(max_delay=0.005))
    offer(rig, (0, 1))
    assert rig.launch() is None
    rig.now += jump
    rig.must_launch()
    rig.run()
    rig.check_all()


def test_a_full_step_waits_for_nobody() -> None:
    rig = Rig(SchedulerConfig(max_delay=10.0))
    offer(rig, (0, 5), (1, 1))
    assert rig.launch() is None
    offer(rig, (0, 3))
    rig.must_launch()
    # Neither does one that the next in line does not fit into.
    offer(rig, (0, 6), (0, 4))
    rig.must_launch()
    assert batches(rig) == [[1, 3], [4]]


def test_sequences_never_wait_for_company() -> None:
    rig = Rig(SchedulerConfig(max_delay=10.0))
    rig.offer(rig.item(range(5)))
    assert rig.must_launch().rows


def test_sequences_and_one_shot_items_of_one_engine_take_turns() -> None:
    rig = Rig()
    rig.offer(rig.item(range(5), max_tokens=4))
    offer(rig, (0, 8), (0, 8), (0, 8))
    rig.run()
    kinds = ["sequence" if plan.rows else "one-shot" for plan in rig.plans]
    assert kinds[:6] == ["sequence", "one-shot"] * 3
    rig.check_all()


def test_cancel_waiting_and_in_flight() -> None:
    rig = Rig(SchedulerConfig(max_batch=2))
    offer(rig, (0, 1), (0, 1), (0, 1))
    rig.must_launch()
    rig.cancel(1000, 3000)
    assert (rig.load().running, rig.load().waiting) == (1, 0)
    rig.run()
    assert [stream.end for stream in rig.streams.values()] == ["", "stop", ""]
    rig.check_all()


def test_a_batch_that_never_fits_is_refused() -> None:
    rig = Rig()
    reason = rig.scheduler.offer([rig.one_shot(0, 9)], rig.now)
    assert reason is not None
    assert "9" in reason
    assert "8" in reason


def step_seconds(plan: StepPlan) -> float:
    """2 ms a step and 0.22 ms a row, as of a small vision model."""
    return 2e-3 + 2.2e-4 * sum(row.rows for row in plan.one_shot)


class Bursts:
    """Single rows with a deadline of 25 ms, at nearly twice the mean rate for a while, then at half of it."""

    def __init__(self, config: SchedulerConfig | None = None, law: Law | None = None) -> None:
        capacity = Capacity(blocks=1, block_size=16, max_rows=64, max_step_tokens=64, max_model_len=64)
        self.rig = Rig(config or SchedulerConfig(), {"m": capacity}, step_seconds, law)
        self.deadlines: dict[int, float] = {}
        self.in_time = 0

    def run(self, rate: float, seconds: float) -> float:
        """Share of the items that were in time."""
        rng = random.Random(1)
        rig, next_arrival, end = self.rig, self.rig.now, self.rig.now + seconds
        while rig.now < end:
            while next_arrival <= rig.now:
                item = rig.item([], 0, rows=1, ttft=0.025, firm=True)
                rig.offer(item)
                self.deadlines[item.item] = next_arrival + 0.025
                burst = 1.9 if int(next_arrival * 2) % 3 == 0 else 0.55
                next_arrival += rng.expovariate(rate * burst)
            plan = rig.launch()
            if rig.in_flight and (plan is None or len(rig.in_flight) == 2):
                self.in_time += sum(rig.now <= self.deadlines[update.item] for update in rig.settle())
            elif plan is None:
                rig.now = min(next_arrival, rig.scheduler.due() or next_arrival)
        return self.in_time / len(self.deadlines)


class TestDeadlines:
    def test_heads_that_are_late_are_dropped_so_that_the_others_are_in_time(self) -> None:
        ours, taken_as_they_come = Bursts(), Bursts(SchedulerConfig(policy="static"))
        # Full batches of 64 give 4,000 a second; bursts ask for 6,600.
        assert ours.run(3500.0, 3.0) > 0.7
        assert taken_as_they_come.run(3500.0, 3.0) < 0.6
        assert ours.rig.load().decisions["dropped late"] > 100
        kept = [item for item in ours.deadlines if not ours.rig.streams[item].dropped]
        assert ours.in_time >= 0.98 * len(kept)

    def test_no_batch_is_so_large_that_its_head_is_late(self) -> None:
        bursts = Bursts()
        bursts.run(2000.0, 0.5)
        rig = bursts.rig
        rig.run()
        for _ in range(30):
            rig.offer(rig.item([], 0, rows=1, ttft=0.006, firm=True))
        plan = rig.must_launch()
        assert 10 < len(plan.one_shot) < 30
        assert step_seconds(plan) < 0.006

    def test_waiting_for_company_ends_where_slack_does(self) -> None:
        bursts = Bursts(SchedulerConfig(max_delay=0.05))
        bursts.run(2000.0, 0.5)
        rig = bursts.rig
        rig.run()
        rig.offer(rig.item([], 0, rows=1, ttft=0.02, firm=True))
        assert rig.launch() is None
        due = rig.scheduler.due()
        assert due is not None
        assert due - rig.now == pytest.approx(0.02 - 2.2e-3, abs=3e-4)

    def test_who_no_longer_waits_is_dropped(self) -> None:
        rig = Rig(SchedulerConfig(max_delay=1.0))
        rig.offer(rig.item([], 0, rows=1, timeout=0.5))
        rig.now += 0.6
        assert rig.launch() is None
        assert [(one.items, one.kind) for one in rig.dropped] == [([1000], "timeout")]
        assert rig.load().decisions == {"client's time ran out": 1}
        rig.check_all()

    def test_a_target_out_of_reach_is_told_once_and_served(self, caplog: pytest.LogCaptureFixture) -> None:
        bursts = Bursts()
        bursts.run(2000.0, 0.5)
        rig = bursts.rig
        rig.run()
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                rig.offer(rig.item([], 0, rows=30, ttft=0.005, firm=True))
                rig.run()
        assert rig.dropped == []
        assert rig.load().decisions["ttft out of reach"] == 3
        assert len(caplog.records) == 1
        assert "30 rows" in caplog.text

    def test_the_higher_class_goes_first(self) -> None:
        rig = Rig(SchedulerConfig(max_batch=1))
        for priority in ("low", "normal", "high"):
            rig.offer(rig.item([], 0, rows=1, priority=priority))
        rig.run()
        assert batches(rig) == [[3], [2], [1]]


def test_shapes_that_nobody_uses_any_more_are_forgotten() -> None:
    """Clients choose them: each lives only as long as somebody waits for it."""
    rig = Rig()
    offer(rig, (7, 1))
    for bucket in range(100, 100 + 2 * MAX_BUCKETS):
        item = rig.one_shot(bucket, 1)
        rig.offer(item)
        rig.cancel(item.item)
    (lane,) = (lane for lane in rig.scheduler._lanes if isinstance(lane, OneShotLane))
    assert len(lane._queues) <= MAX_BUCKETS
    plan = rig.must_launch()
    assert [row.bucket for row in plan.one_shot] == [7]
