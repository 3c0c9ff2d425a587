"""Classes, tenants and requests of items that end after one step. The rig's engine takes 8 rows."""

from __future__ import annotations

import msgspec
import pytest

from server.scheduler.class_shares import AGEING, FLOOR
from server.scheduler.config import SchedulerConfig
from server.scheduler.law import Law
from tests.unit.scheduler.rig import SMALL, Rig
from tests.unit.scheduler.test_one_shot import batches, offer, step_seconds


def trained(config: SchedulerConfig | None = None) -> Rig:
    """A rig with 8 rows a step that knows how long its steps take."""
    rig = Rig(config, seconds=step_seconds)
    for rows in (1, 8, 4, 6, 2):
        offer(rig, (0, rows))
        rig.run()
    rig.plans.clear()
    rig.streams.clear()
    return rig


def tenants(rig: Rig) -> list[str]:
    """Who had each item of each step, in the order of service."""
    return [rig.streams[row.item].item.tenant for plan in rig.plans for row in plan.one_shot]


class TestFairness:
    def test_a_tenant_that_floods_does_not_make_another_wait(self) -> None:
        rig = trained()
        for _ in range(100):
            rig.offer(rig.item([], 0, rows=1, tenant="flood"))
        for _ in range(8):
            rig.offer(rig.item([], 0, rows=1, tenant="other"))
        rig.run()
        # They take turns from the first step on, row by row.
        assert tenants(rig)[:16].count("other") == 8
        rig.check_all()

    def test_weights_share_the_rows(self) -> None:
        rig = trained()
        for _ in range(60):
            rig.offer(rig.item([], 0, rows=1, tenant="heavy", weight=3.0))
            rig.offer(rig.item([], 0, rows=1, tenant="light"))
        rig.run()
        assert tenants(rig)[:64].count("heavy") == pytest.approx(48, abs=2)

    def test_dear_rows_count_for_more(self) -> None:
        capacity = msgspec.structs.replace(SMALL, max_rows=1)
        rig = Rig(None, {"m": capacity}, lambda plan: 0.1 if plan.one_shot[0].bucket else 0.01)
        for _ in range(5):
            offer(rig, (0, 1), (1, 1))
            rig.run()
        rig.plans.clear()
        for _ in range(40):
            rig.offer(rig.item([], 0, rows=1, bucket=0, tenant="cheap"))
            rig.offer(rig.item([], 0, rows=1, bucket=1, tenant="dear"))
        for _ in range(44):
            rig.tick()
        assert tenants(rig)[:44].count("dear") == pytest.approx(4, abs=1)

    def test_fairness_can_be_switched_off(self) -> None:
        rig = Rig(SchedulerConfig(max_batch=1), law=Law(fairness=False))
        for _ in range(20):
            rig.offer(rig.item([], 0, rows=1, tenant="flood"))
        rig.offer(rig.item([], 0, rows=1, tenant="other"))
        rig.run()
        assert tenants(rig)[-1] == "other"

    def test_who_waits_long_rises(self) -> None:
        rig = Rig(SchedulerConfig(max_batch=1))
        rig.offer(rig.item([], 0, rows=1, priority="high"))
        rig.offer(rig.item([], 0, rows=1, priority="normal"))
        rig.offer(rig.item([], 0, rows=1, priority="low", waited=2 * AGEING + 1))
        rig.run()
        assert batches(rig) == [[3], [1], [2]]

    def test_a_class_that_waits_keeps_its_floor(self) -> None:
        rig = Rig(SchedulerConfig(max_batch=8))
        for _ in range(20):
            rig.offer(rig.item([], 0, rows=8, priority="low"))
        for _ in range(600):
            rig.offer(rig.item([], 0, rows=8, priority="high"))
        for _ in range(600):
            rig.tick()
        ranks = [rig.streams[plan.one_shot[0].item].item.priority for plan in rig.plans]
        assert 0.5 * FLOOR < ranks.count("low") / len(ranks) <= FLOOR
        assert rig.load().decisions["admitted by its class's floor"] == ranks.count("low")

    def test_nothing_is_kept_of_tenants_whose_items_are_gone(self) -> None:
        rig = trained()
        for tenant in ("a", "b", "c"):
            rig.offer(rig.item([], 0, rows=1, tenant=tenant))
            rig.offer(rig.item([], 0, rows=1, tenant=tenant, suspect=True))
        rig.must_launch()
        rig.cancel(*rig.streams)
        rig.run()
        lane = rig.scheduler._engines["m"].one_shot
        assert [account.items for account in lane._accounts._accounts.values()] == [0, 0, 0, 0]
        assert not lane.waiting


class TestRequests:
    def test_a_request_is_dropped_whole(self) -> None:
        rig = trained()
        for _ in range(4):
            offer(rig, (0, 8))
        rig.must_launch()
        rig.must_launch()
        group = rig.group([], 2, 0, rows=4, ttft=0.006, firm=True)
        rig.offer(*group)
        rig.run()
        assert [one.items for one in rig.dropped] == [[item.item for item in group]]
        rig.check_all()

    def test_one_of_which_an_item_runs_is_not_dropped(self) -> None:
        rig = trained()
        group = rig.group([], 2, 0, rows=8, ttft=0.006, firm=True)
        rig.offer(*group)
        rig.must_launch()
        rig.now += 1.0
        rig.run()
        assert rig.dropped == []
        rig.check_all()

    def test_a_client_that_left_is_told_wherever_its_item_is_in_the_queue(self) -> None:
        rig = Rig(SchedulerConfig(max_batch=1, max_delay=1.0))
        rig.offer(rig.item([], 0, rows=1))
        rig.offer(rig.item([], 0, rows=1, ttft=50.0, timeout=0.005))
        rig.must_launch()
        rig.now += 0.006
        rig.launch()
        assert [one.items for one in rig.dropped] == [[2000]]

    def test_a_batch_ends_where_one_in_it_would_be_late(self) -> None:
        rig = trained()
        rig.offer(rig.item([], 0, rows=1, priority="high"))
        for _ in range(7):
            rig.offer(rig.item([], 0, rows=1, ttft=0.003))
        plan = rig.must_launch()
        assert 2 <= len(plan.one_shot) < 6
        assert rig.load().decisions["batch bound by a deadline"] == 1


def test_the_predicted_wait_is_that_of_the_batches_ahead() -> None:
    rig = trained()
    before = rig.load().predicted_wait
    for _ in range(10):
        offer(rig, (0, 8))
    began, predicted = rig.now, rig.load().predicted_wait - before
    rig.run()
    assert predicted == pytest.approx(rig.now - began, rel=0.05)
