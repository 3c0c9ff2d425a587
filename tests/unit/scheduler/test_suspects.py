"""An item that was there when workers died runs alone: nobody shares a step with it, and nothing else is in flight."""

from __future__ import annotations

from typing import Any

import pytest

from engines.protocol import StepPlan
from server.scheduler.config import SchedulerConfig
from tests.unit.scheduler.rig import Rig, with_capacity


def items_of(plan: StepPlan) -> set[int]:
    return {row.item for row in plan.rows} | {row.item for row in plan.one_shot}


def run_and_watch(rig: Rig, suspects: set[int]) -> None:
    """To the end; no step of a suspect without a token may be beside anything."""
    while True:
        plan = rig.launch()
        if plan is not None:
            items = items_of(plan)
            beside = {item for one in rig.in_flight for item in items_of(one)}
            alone = {item for item in beside & suspects if not rig.streams[item].updates}
            assert not alone or beside == alone == items
        if rig.in_flight and (plan is None or len(rig.in_flight) == 2):
            rig.settle()
            rig.check()
        elif plan is None:
            return


@pytest.mark.parametrize("budget", [None, 4])
def test_a_suspect_is_alone_until_its_first_token(budget: int | None) -> None:
    rig = Rig(SchedulerConfig(token_budget=budget))
    for start in range(3):
        rig.offer(rig.item([start] * 9, max_tokens=12))
    suspect = rig.item(range(11), max_tokens=6, suspect=True)
    rig.offer(suspect)
    run_and_watch(rig, {suspect.item})
    rig.check_all()
    assert rig.load().decisions["suspect alone"] == (1 if budget is None else 3)


def test_one_suspect_at_a_time_and_the_others_get_on() -> None:
    rig = Rig()
    rig.offer(rig.item([9], max_tokens=40))
    suspects = [rig.item([start] * 6, max_tokens=4, suspect=True) for start in range(3)]
    for item in suspects:
        rig.offer(item)
    run_and_watch(rig, {item.item for item in suspects})
    rig.check_all()
    admitted = [[admit.item for admit in plan.admits] for plan in rig.plans[:6]]
    assert admitted == [[2000], [1000], [3000], [], [4000], []]


def test_a_replayed_suspect_goes_on_where_it_was() -> None:
    rig = Rig()
    rig.offer(rig.item([1], max_tokens=30))
    plain = rig.item(range(6), max_tokens=9)
    first = Rig()
    first.offer(plain)
    first.run()
    sent = first.streams[plain.item].tokens[:3]
    fields: dict[str, Any] = {"tokens": [*range(6), *sent], "prompt_length": 6, "suspect": True}
    again = rig.item(range(6), max_tokens=9, seed=plain.sampling.seed, **fields)
    rig.offer(again)
    run_and_watch(rig, {again.item})
    assert rig.streams[again.item].tokens == first.streams[plain.item].tokens[3:]


def test_a_suspect_gets_a_place_where_there_is_none() -> None:
    rig = with_capacity(max_rows=2)
    for start in range(2):
        rig.offer(rig.item([start] * 5, max_tokens=80))
    for _ in range(5):
        rig.tick()
    suspect = rig.item([7] * 5, max_tokens=2, suspect=True)
    rig.offer(suspect)
    run_and_watch(rig, {suspect.item})
    assert rig.load().decisions["preempted for a suspect"] == 1
    rig.check_all()


def test_choices_of_one_request_are_suspected_one_by_one() -> None:
    rig = Rig()
    group = rig.group(range(10), 3, suspect=True)
    rig.offer(*group)
    run_and_watch(rig, {item.item for item in group})
    rig.check_all()


def test_a_suspect_can_be_cancelled() -> None:
    rig = Rig()
    suspect = rig.item(range(10), suspect=True)
    rig.offer(suspect)
    rig.must_launch()
    rig.cancel(suspect.item)
    rig.offer(rig.item(range(3)))
    rig.run()
    rig.check_all()


def test_one_shot_suspects_are_alone_too() -> None:
    rig = Rig()
    rig.offer(rig.one_shot(0, 2))
    suspect = rig.item([], 0, bucket=0, rows=2, suspect=True)
    rig.offer(suspect)
    rig.offer(rig.one_shot(0, 2))
    cancelled = rig.item([], 0, bucket=0, rows=1, suspect=True)
    rig.offer(cancelled)
    rig.cancel(cancelled.item)
    run_and_watch(rig, {suspect.item})
    rig.check_all()
    assert [len(plan.one_shot) for plan in rig.plans] == [1, 2]
