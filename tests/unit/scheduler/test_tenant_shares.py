"""Slots are left free beside a tenant that floods, and only there. Streams of about 40 tokens, steps of 20 ms."""

from __future__ import annotations

import random

import pytest

from engines.protocol import Capacity
from server.scheduler import fairness
from server.scheduler.config import SchedulerConfig
from server.scheduler.fairness import RECENT, TenantAccounts
from tests.unit.scheduler.rig import Rig

CAPACITY = Capacity(blocks=2000, block_size=16, max_rows=64, max_step_tokens=2048, max_model_len=2000)
ALONE = 57
"""Of 64 slots: with 56 taken, the 57th is at most eight times the eight that are free; with 57, the 58th is more."""


def make() -> Rig:
    return Rig(SchedulerConfig(prefix_cache=False), {"m": CAPACITY}, lambda plan: 0.02)


def flood(rig: Rig, count: int, tenant: str = "flood") -> None:
    for number in range(count):
        length = 20 + len(rig.streams) * 7 % 41  # 20 to 60, so that they do not end together
        rig.offer(rig.item([number % 50] * 20, max_tokens=length, tenant=tenant))


def running(rig: Rig, tenant: str) -> int:
    slots = {state.item.tenant: state.account.slots for state in rig.scheduler._engines["m"].sequences._residents}
    return slots.get(tenant, 0)


def turn(rig: Rig, rounds: int) -> None:
    for _ in range(rounds):
        rig.tick()


def waits() -> list[float]:
    """Ascending seconds to the first token of a tenant that sends ten requests a second beside 200 open ones."""
    rig, chance = make(), random.Random(1)
    rig.offer(rig.item([1], max_tokens=1, tenant="steady"))
    flood(rig, 200)
    arrivals: dict[int, float] = {}
    waited: list[float] = []
    ended = 0
    following = rig.now + 2.0
    while len(waited) < 200:
        while following <= rig.now:
            item = rig.item([1] * 20, max_tokens=40, tenant="steady", waited=rig.now - following)
            rig.offer(item)
            arrivals[item.item] = following
            following += chance.expovariate(10.0)
        rig.tick()
        over = sum(bool(stream.end) for stream in rig.streams.values() if stream.item.tenant == "flood")
        flood(rig, over - ended)
        ended = over
        for item_id in [each for each in arrivals if rig.streams[each].tokens]:
            waited.append(rig.now - arrivals.pop(item_id))
    rig.check()
    return sorted(waited)


def test_who_comes_beside_a_flood_does_not_wait_for_its_streams_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert waits()[197] < 0.061  # of 200: the rest of the step that runs, the one behind it, and its own
    monkeypatch.setattr(fairness, "SHARE", 1000)
    assert waits()[197] > 0.08


@pytest.mark.parametrize("tenant", ["", "only"])
def test_one_tenant_has_all_slots(tenant: str) -> None:
    rig = make()
    flood(rig, 100, tenant)
    turn(rig, 6)
    assert rig.load().running == 64


def test_slots_stay_free_for_a_minute_after_another_tenant_was_here() -> None:
    rig = make()
    rig.offer(rig.item([1] * 20, max_tokens=2, tenant="other"))
    rig.run()
    seen = rig.now
    flood(rig, 200)
    turn(rig, 6)
    assert rig.load().running == running(rig, "flood") == ALONE
    assert rig.load().decisions["waits for its tenant's share"] > 0
    rig.now = seen + RECENT - 1
    turn(rig, 3)
    assert rig.load().running == ALONE
    rig.now = seen + RECENT + 1
    turn(rig, 3)
    assert rig.load().running == 64


def test_two_floods_share_and_leave_room_for_a_third() -> None:
    rig = make()
    for tenant in ("a", "b"):
        flood(rig, 200, tenant)
    turn(rig, 100)
    assert min(running(rig, "a"), running(rig, "b")) >= 25
    assert rig.load().running <= 61
    flood(rig, 1, "c")
    turn(rig, 3)
    assert running(rig, "c") == 1


def test_a_tenant_that_had_more_is_not_stopped_by_one_at_its_share() -> None:
    rig = make()
    flood(rig, 200)
    rig.offer(rig.item([1] * 20, max_tokens=500, tenant="heavy", weight=0.001))
    turn(rig, 20)
    assert running(rig, "heavy") == 1
    late = rig.item([1] * 20, max_tokens=2, tenant="heavy", weight=0.001)
    rig.offer(late)
    turn(rig, 3)
    assert rig.streams[late.item].tokens


def test_what_was_preempted_comes_back_whatever_its_tenant_has() -> None:
    rig = make()
    flood(rig, 1, "other")
    flood(rig, 100)
    turn(rig, 6)
    while rig.in_flight:
        rig.settle()
    taken = running(rig, "flood")
    assert taken < 60
    lane = rig.scheduler._engines["m"].sequences
    victims = [state for state in lane._residents if state.item.tenant == "flood"][:10]
    # Their slots go to the other tenant meanwhile.
    flood(rig, 20, "other")
    for victim in victims:
        lane._planner._preemption.preempt(victim, "preempted for blocks")
    rig.must_launch()
    assert all(victim.slot >= 0 for victim in victims)


def test_a_higher_class_takes_a_slot_beyond_its_tenant_s_share_from_nobody() -> None:
    rig = make()
    for number in range(64):
        rig.offer(rig.item([number % 50] * 20, max_tokens=400, tenant="high", priority="low"))
    turn(rig, 6)
    flood(rig, 1, "other")
    urgent = rig.item([1] * 20, max_tokens=2, tenant="high", priority="high", waited=5.0)
    rig.offer(urgent)
    turn(rig, 4)
    assert rig.load().preemptions == 0
    rig.run()
    rig.check_all()


def test_a_tenant_without_items_is_seen_until_its_minute_is_over() -> None:
    accounts = TenantAccounts()
    accounts.leave(accounts.enter("a", 1.0, now=0.0))
    assert not accounts.shared(1.0)
    first = accounts.enter("b", 1.0, now=10.0)
    assert accounts.shared(10.0 + RECENT - 11.0)
    assert not accounts.shared(RECENT + 1.0)
    accounts.enter("a", 1.0, now=RECENT + 1.0)
    assert accounts.shared(10 * RECENT)
    accounts.leave(first)
    assert not accounts.shared(10 * RECENT)
