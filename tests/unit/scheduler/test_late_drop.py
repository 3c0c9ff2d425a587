"""What cannot be in time is refused before it costs anything; what has started is never given up."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from engines.protocol import Capacity, StepPlan
from server.scheduler.config import SchedulerConfig
from server.scheduler.drops import RETRY
from server.scheduler.law import Law
from server.scheduler.step_time import SURE, attended_pairs
from tests.unit.scheduler.rig import Rig

LARGE = Capacity(blocks=8000, block_size=16, max_rows=64, max_step_tokens=2048, max_model_len=12000)


def machine(plan: StepPlan) -> float:
    """10 ms a step, 0.1 ms a token and 1 ns a pair."""
    pairs = sum(attended_pairs(row.start, row.count) for row in plan.rows)
    return 0.010 + 1e-4 * sum(row.count for row in plan.rows) + 1e-9 * pairs


def trained(config: SchedulerConfig | None = None, law: Law | None = None, **capacity: int) -> Rig:
    """A rig that knows its machine, with nothing in it."""
    rig = Rig(config or SchedulerConfig(), {"m": LARGE}, machine, law)
    for number in range(12):
        rig.offer(rig.item([number] * (50 + 90 * number), max_tokens=SURE // 4))
        for _ in range(4):
            rig.tick()
    rig.run()
    rig.streams.clear()
    return rig


def firm(rig: Rig, length: int, ttft: float, **fields: Any) -> int:
    item = rig.item([rig.scheduler._arrival % 50] * length, max_tokens=3, **{"ttft": ttft, "firm": True} | fields)
    rig.offer(item)
    return item.item


class TestOverload:
    def test_those_that_surely_cannot_be_in_time_are_dropped_at_once(self) -> None:
        rig = trained(SchedulerConfig(prefix_cache=False))
        # A tenth of a second each, and half a second for all of them.
        items = [firm(rig, 1000, 0.5) for _ in range(20)]
        rig.must_launch()
        dropped = [item for one in rig.dropped for item in one.items]
        assert dropped == items[6:]
        assert {one.kind for one in rig.dropped} == {"overload"}
        rig.run()
        rig.check_all()
        assert all(stream.tokens for stream in rig.streams.values() if not stream.dropped)
        assert rig.load().decisions["dropped late"] == 16
        assert rig.load().decisions["first token in time"] == 4

    def test_whoever_may_still_be_in_time_takes_the_place_of_one_that_leaves(self) -> None:
        rig = trained(SchedulerConfig(prefix_cache=False))
        items = [firm(rig, 1000, 0.5) for _ in range(6)]
        rig.must_launch()
        rig.cancel(items[3])
        rig.run()
        assert [one.items for one in rig.dropped] == [[items[5]]]
        assert rig.load().decisions["first token in time"] == 4
        rig.check_all()

    def test_admitted_items_are_in_time_and_the_machine_stays_busy(self) -> None:
        rig = trained(SchedulerConfig(prefix_cache=False))
        began = rig.now
        # A ten times burst on top of half the load.
        for step in range(60):
            for _ in range(10 if step == 20 else 1):
                firm(rig, 200, 0.4)
            for _ in range(4):
                rig.tick()
        rig.run()
        decisions = rig.load().decisions
        served = decisions["first token in time"]
        assert decisions.get("first token late", 0) <= 0.01 * served
        assert served > 55
        assert rig.now - began < 4.0

    def test_soft_items_are_never_dropped(self) -> None:
        rig = trained()
        for _ in range(20):
            rig.offer(rig.item([1] * 1000, max_tokens=2, ttft=0.2))
            rig.offer(rig.item([2] * 1000, max_tokens=2, firm=True))
        rig.run()
        assert rig.dropped == []
        rig.check_all()

    def test_nothing_is_dropped_after_its_first_token(self) -> None:
        rig = trained()
        item = firm(rig, 100, 0.1)
        while not rig.streams[item].tokens:
            rig.tick()
        rig.now += 100.0
        rig.run()
        assert rig.dropped == []
        rig.check_all()

    def test_a_replay_is_never_dropped(self) -> None:
        rig = trained()
        rig.offer(rig.item([1] * 50, max_tokens=8, tokens=[1] * 52, prompt_length=50, ttft=0.1, firm=True, waited=60.0))
        rig.must_launch()
        assert rig.dropped == []

    def test_one_whose_first_token_is_on_its_way_is_not_dropped(self) -> None:
        rig = trained()
        item = firm(rig, 100, 0.1)
        rig.must_launch()
        rig.now += 5.0
        rig.launch()
        rig.run()
        assert rig.dropped == []
        assert rig.streams[item].end == "length"

    def test_a_prompt_half_way_is_dropped_too(self) -> None:
        rig = trained()
        item = firm(rig, 5000, 0.9)
        rig.must_launch()
        rig.now += 0.8
        rig.launch()
        assert [one.items for one in rig.dropped] == [[item]]
        rig.run()
        rig.check_all()

    def test_a_request_is_dropped_whole_or_not_at_all(self) -> None:
        rig = trained()
        group = rig.group([30] * 1000, 3, ttft=0.15, firm=True)
        rig.offer(*group)
        rig.now += 0.1
        assert rig.launch() is None
        assert [one.items for one in rig.dropped] == [[item.item for item in group]]
        other = rig.group([31] * 100, 3, max_tokens=20, ttft=0.15, firm=True)
        rig.offer(*other)
        while not rig.streams[other[0].item].tokens:
            rig.tick()
        rig.now += 1.0
        rig.run()
        assert len(rig.dropped) == 1
        rig.check_all()

    def test_the_client_is_told_when_the_queue_should_be_gone(self) -> None:
        rig = trained(SchedulerConfig(prefix_cache=False))
        for _ in range(100):
            rig.offer(rig.item([3] * 1000, max_tokens=1, ttft=0.1))
        firm(rig, 1000, 5.0)
        rig.must_launch()
        (dropped,) = rig.dropped
        assert dropped.retry_after == pytest.approx(10.0, rel=0.3)
        assert RETRY[0] <= dropped.retry_after <= RETRY[1]

    def test_it_can_be_switched_off(self) -> None:
        rig = trained(law=Law(late_drop=False))
        for _ in range(20):
            firm(rig, 1000, 0.2)
        rig.run()
        assert rig.dropped == []

    def test_an_engine_that_goes_takes_no_drop_with_it(self) -> None:
        rig = trained()
        item = firm(rig, 1000, 0.15, waited=5.0)
        rig.scheduler.plan(rig.now, rig.capacities)
        assert rig.scheduler.remove_engine("m") == []
        assert [one.items for one in rig.scheduler.dropped()] == [[item]]


class TestOutOfReach:
    def test_a_prompt_that_is_too_long_for_its_target_is_served_and_told_once(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        rig = trained()
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                firm(rig, 8000, 0.3)
            rig.run()
        assert rig.dropped == []
        assert rig.load().decisions["ttft out of reach"] == 3
        assert len(caplog.records) == 1
        assert "8000 tokens" in caplog.text
        rig.check_all()

    def test_it_does_not_make_others_late(self) -> None:
        rig = trained(SchedulerConfig(prefix_cache=False))
        firm(rig, 8000, 0.3)
        chats = [firm(rig, 200, 0.3) for _ in range(8)]
        rig.run()
        assert rig.dropped == []
        assert rig.load().decisions["first token in time"] == len(chats)


class TestTimeout:
    def test_who_no_longer_waits_is_dropped(self) -> None:
        rig = Rig(SchedulerConfig(max_batch=1))
        rig.offer(rig.item([1], max_tokens=100))
        for timeout in (0.1, 5.0, None):
            rig.offer(rig.item([2, 3], max_tokens=2, timeout=timeout))
        rig.run()
        (dropped,) = rig.dropped
        assert (dropped.items, dropped.kind, dropped.retry_after) == ([2000], "timeout", 0.0)
        assert rig.load().decisions["client's time ran out"] == 1
        rig.check_all()

    def test_time_before_the_offer_counts(self) -> None:
        rig = Rig()
        rig.offer(rig.item([1], waited=2.0, timeout=1.5))
        assert rig.launch() is None
        assert [one.kind for one in rig.dropped] == ["timeout"]

    def test_a_started_stream_is_not_dropped(self) -> None:
        rig = Rig()
        rig.offer(rig.item([1], max_tokens=50, timeout=0.1))
        rig.run()
        assert rig.dropped == []
        rig.check_all()

    @pytest.mark.parametrize("policy", ["aimd", "static"])
    def test_under_any_policy(self, policy: Any) -> None:
        rig = Rig(SchedulerConfig(max_batch=1, policy=policy))
        rig.offer(rig.item([1], max_tokens=100))
        rig.offer(rig.item([2], timeout=0.1))
        rig.run()
        assert [one.items for one in rig.dropped] == [[2000]]


class TestPredictedWait:
    def wait_of_one_more(self, rig: Rig) -> float:
        """Seconds until it has its first token."""
        began = rig.now
        last = rig.item([4], max_tokens=1)
        rig.offer(last)
        while not rig.streams[last.item].tokens:
            rig.tick()
        return rig.now - began

    def test_it_is_the_time_until_the_next_arrival_is_served(self) -> None:
        rig = trained(SchedulerConfig(prefix_cache=False))
        assert rig.load().predicted_wait < 0.02
        for _ in range(30):
            rig.offer(rig.item([3] * 1000, max_tokens=1))
        rig.must_launch()
        load = rig.load()
        assert load.predicted_wait == pytest.approx(self.wait_of_one_more(rig), rel=0.3)
        assert load.prompt_token_seconds == pytest.approx(1e-4, rel=0.3)

    def test_where_slots_are_short_it_counts_the_streams_that_have_to_end(self) -> None:
        rig = trained(SchedulerConfig(max_batch=4))
        for number in range(100):
            rig.offer(rig.item([number] * 10, max_tokens=50))
        for _ in range(800):
            rig.tick()
        predicted = rig.load().predicted_wait
        assert predicted == pytest.approx(self.wait_of_one_more(rig), rel=0.3)

    def test_a_surge_after_a_calm_is_judged_by_the_pace_of_now(self) -> None:
        rig = trained(SchedulerConfig(max_batch=4))
        for number in range(60):
            rig.offer(rig.item([number] * 10, max_tokens=50))
            rig.run()
            rig.now += 5.0
        for number in range(20):
            rig.offer(rig.item([number] * 10, max_tokens=50))
        rig.tick()
        predicted = rig.load().predicted_wait
        assert predicted == pytest.approx(self.wait_of_one_more(rig), rel=0.3)
