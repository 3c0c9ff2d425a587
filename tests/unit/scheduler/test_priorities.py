"""Who goes first: classes, tenants, deadlines. The rig has 8 slots and blocks of 4 tokens."""

from __future__ import annotations

from typing import Any

import pytest

from engines.protocol import Capacity
from server.scheduler.class_shares import AGEING, FLOOR
from server.scheduler.config import SchedulerConfig
from server.scheduler.fairness import MAX_IDLE, TenantAccounts
from server.scheduler.law import Law
from server.worker.wire import Item
from tests.unit.scheduler.rig import Rig, with_capacity

BIG = Capacity(blocks=4000, block_size=16, max_rows=8, max_step_tokens=64, max_model_len=2000)


def admitted(rig: Rig) -> list[int]:
    """Requests in the order in which they first got a slot, by their number."""
    items = [admit.item for plan in rig.plans for admit in plan.admits]
    return [item // 1000 for item in dict.fromkeys(items)]


def one_slot() -> Rig:
    """One slot, which is taken for a while; whoever is offered waits."""
    rig = Rig(SchedulerConfig(max_batch=1))
    rig.offer(rig.item([1], max_tokens=4))
    rig.must_launch()
    return rig


def offer(rig: Rig, **fields: Any) -> Item:
    item = rig.item(range(3), max_tokens=1, **fields)
    rig.offer(item)
    return item


class TestOrder:
    def test_the_earliest_deadline_goes_first(self) -> None:
        rig = one_slot()
        for ttft in (9.0, 3.0, 6.0):
            offer(rig, ttft=ttft)
        offer(rig, ttft=9.0, waited=8.0)
        rig.run()
        assert admitted(rig) == [1, 5, 3, 4, 2]
        rig.check_all()

    def test_without_targets_long_prompts_have_more_time(self) -> None:
        rig = Rig(
            SchedulerConfig(max_batch=1),
            {"m": Capacity(blocks=600, block_size=16, max_rows=8, max_step_tokens=9000, max_model_len=9000)},
        )
        rig.offer(rig.item([1], max_tokens=4))
        rig.must_launch()
        rig.offer(rig.item([2] * 8000, max_tokens=1))
        offer(rig)
        rig.run()
        assert admitted(rig) == [1, 3, 2]

    def test_a_prompt_in_the_making_gives_way_to_an_earlier_deadline(self) -> None:
        rig = Rig(SchedulerConfig(token_budget=16))
        rig.offer(rig.item([1] * 60, max_tokens=1, ttft=9.0))
        rig.must_launch()
        rig.offer(rig.item([2] * 16, max_tokens=1, ttft=0.5))
        assert [row.item for row in rig.must_launch().rows] == [2000]
        rig.run()
        rig.check_all()

    def test_first_come_first_served_where_deadlines_do_not_count(self) -> None:
        rig = Rig(SchedulerConfig(max_batch=1, policy="static"))
        rig.offer(rig.item([1], max_tokens=4))
        for ttft in (9.0, 3.0):
            offer(rig, ttft=ttft, priority="low" if ttft > 5 else "high")
        rig.run()
        assert admitted(rig) == [1, 2, 3]


class TestClasses:
    def test_the_higher_class_goes_first(self) -> None:
        rig = one_slot()
        for priority in ("low", "normal", "high", "low", "high"):
            offer(rig, priority=priority)
        rig.run()
        assert admitted(rig) == [1, 4, 6, 3, 2, 5]
        rig.check_all()

    def test_who_waited_long_counts_for_the_class_above(self) -> None:
        rig = one_slot()
        offer(rig, priority="low", waited=2 * AGEING + 1)
        offer(rig, priority="high")
        offer(rig, priority="normal", waited=AGEING + 1)
        rig.run()
        # All three count as high now, so the deadline decides.
        assert admitted(rig) == [1, 2, 4, 3]

    def test_a_class_that_waits_gets_its_floor(self) -> None:
        rig = Rig(SchedulerConfig(max_batch=1, prefix_cache=False), {"m": BIG})
        low = offer(rig, priority="low")
        for _ in range(3):
            rig.offer(rig.item([5] * 60, max_tokens=1, priority="high"))
        ahead = 0
        while not rig.streams[low.item].end:
            rig.offer(rig.item([5] * 60, max_tokens=1, priority="high"))
            rig.tick()
            ahead += 1
            assert ahead < 100
        # Its share of all prompt tokens is in the order of the floor, not of its number.
        low_tokens = 3
        high_tokens = sum(row.count for plan in rig.plans for row in plan.rows if row.item != low.item)
        assert low_tokens / high_tokens <= FLOOR

    def test_the_floor_is_kept_over_a_long_time(self) -> None:
        rig = Rig(SchedulerConfig(max_batch=2, prefix_cache=False), {"m": BIG})
        for priority in ("high", "low") * 10:
            rig.offer(rig.item([5] * 50, max_tokens=1, priority=priority))
        done = {"high": 0, "low": 0}
        while done["high"] + done["low"] < 300:
            for priority in done:
                if len([s for s in rig.streams.values() if s.item.priority == priority and not s.end]) < 10:
                    rig.offer(rig.item([5] * 50, max_tokens=1, priority=priority))
            rig.tick()
            rig.now -= 0.01  # nobody ages
            for priority in done:
                done[priority] = sum(1 for s in rig.streams.values() if s.item.priority == priority and s.end)
        assert 0.04 < done["low"] / 300 < 0.08
        assert rig.load().decisions["admitted by its class's floor"] > 5


class TestFairness:
    def test_tenants_take_turns_however_much_one_asks_for(self) -> None:
        rig = one_slot()
        for _ in range(6):
            offer(rig, tenant="flood")
        for _ in range(2):
            offer(rig, tenant="small")
        rig.run()
        order = admitted(rig)[1:]
        assert {order.index(8), order.index(9)} <= {0, 1, 2, 3}
        rig.check_all()

    def test_weight_gives_a_larger_share(self) -> None:
        rig = one_slot()
        for _ in range(12):
            offer(rig, tenant="three", weight=3.0)
            offer(rig, tenant="one")
        rig.run()
        first = admitted(rig)[1:13]
        assert sum(1 for request in first if request % 2 == 0) == 9

    def test_who_was_away_has_no_credit_for_that(self) -> None:
        rig = one_slot()
        for _ in range(40):
            offer(rig, tenant="steady")
        for _ in range(60):
            rig.tick()
        before = len(admitted(rig))
        for _ in range(10):
            offer(rig, tenant="returns")
        rig.run()
        next_ten = admitted(rig)[before : before + 10]
        assert 4 <= sum(1 for request in next_ten if request > 41) <= 6

    def test_one_tenant_alone_is_not_held_back(self) -> None:
        rig = one_slot()
        for ttft in (9.0, 3.0, 6.0):
            offer(rig, ttft=ttft, tenant="only")
        rig.run()
        assert admitted(rig) == [1, 3, 4, 2]

    def test_it_can_be_switched_off(self) -> None:
        rig = Rig(SchedulerConfig(max_batch=1), law=Law(fairness=False))
        rig.offer(rig.item([1], max_tokens=4))
        for tenant in "aaab":
            offer(rig, tenant=tenant)
        rig.run()
        assert admitted(rig) == [1, 2, 3, 4, 5]

    def test_cached_tokens_are_free_and_output_costs_double(self) -> None:
        rig = Rig()
        rig.offer(rig.item(range(9), max_tokens=3, tenant="a"))
        rig.run()
        rig.offer(rig.item(range(9), max_tokens=3, tenant="b"))
        accounts = rig.scheduler._engines["m"].sequences._accounts._accounts
        before = accounts["b"].served
        rig.run()
        assert accounts["a"].served == 9 + 2 * 3
        assert accounts["b"].served - before == 1 + 2 * 3

    def test_many_idle_tenants_are_forgotten(self) -> None:
        accounts = TenantAccounts()
        for number in range(3 * MAX_IDLE):
            accounts.leave(accounts.enter(str(number), 1.0, now=0.0))
        assert len(accounts._accounts) <= MAX_IDLE + 2


class TestPreemptionByClass:
    def fill(self, priority: str = "low") -> Rig:
        rig = with_capacity(max_rows=2)
        for start in (1, 2):
            rig.offer(rig.item([start] * 5, max_tokens=60, priority=priority))
        for _ in range(4):
            rig.tick()
        return rig

    def test_a_higher_class_takes_a_slot_when_its_deadline_comes_near(self) -> None:
        rig = self.fill()
        rig.offer(rig.item([3] * 5, max_tokens=3, priority="high", ttft=0.2))
        rig.tick()
        assert rig.load().preemptions == 0
        while not rig.streams[3000].tokens:
            rig.tick()
        assert rig.now < 100.3
        assert rig.load().preemptions == 1
        assert rig.load().decisions["preempted for a higher class"] == 1
        rig.run()
        rig.check_all()

    def test_the_same_class_waits(self) -> None:
        rig = self.fill("high")
        rig.offer(rig.item([3] * 5, max_tokens=3, priority="high", ttft=0.2))
        rig.run()
        assert rig.load().preemptions == 0
        rig.check_all()

    def test_after_two_times_an_item_is_left_alone(self) -> None:
        rig = with_capacity(max_rows=1)
        rig.offer(rig.item([1] * 5, max_tokens=100, priority="low"))
        for _ in range(4):
            for _ in range(6):
                rig.tick()
            rig.offer(rig.item([3] * 5, max_tokens=2, priority="high", waited=5.0))
        rig.run()
        assert rig.load().preemptions == 2
        rig.check_all()


@pytest.mark.parametrize("policy", ["adaptive", "aimd", "static"])
def test_every_policy_serves_everybody(policy: str) -> None:
    rig = Rig(SchedulerConfig(max_batch=3, policy=policy))  # type: ignore[arg-type]
    for number in range(30):
        rig.offer(
            rig.item(range(number % 7 + 1), max_tokens=5, tenant="ab"[number % 2], priority=["high", "low"][number % 2])
        )
    rig.run()
    rig.check_all()
