"""Blocks run out: the latest arrival gives way and goes on later. The rig has blocks of 4 tokens."""

from __future__ import annotations

import pytest

from server.scheduler.config import SchedulerConfig
from tests.unit.scheduler.rig import Rig, with_capacity


def squeezed() -> Rig:
    """Two residents whose outputs do not fit side by side; the first arrival must go through undisturbed."""
    rig = with_capacity(blocks=8)
    rig.offer(rig.item(range(8), max_tokens=16))
    rig.offer(rig.item(range(20, 28), max_tokens=16))
    return rig


def test_the_latest_arrival_gives_way_and_continues_its_stream() -> None:
    rig = squeezed()
    rig.run()
    rig.check_all()
    assert rig.load().preemptions == 1
    again = [admit for plan in rig.plans for admit in plan.admits if len(admit.tokens) > admit.prompt_length]
    assert [admit.item for admit in again] == [2000]
    # Its own blocks are found again as far as they were not reused; that is no saving on its prompt.
    assert again[0].blocks
    assert {update.cached_tokens for update in rig.streams[2000].updates} == {0}
    assert {update.queue_seconds for update in rig.streams[2000].updates} == {0.0}
    assert (rig.load().prefix_queries, rig.load().prefix_hits) == (16, 0)


def test_what_was_in_flight_is_appended_before_the_item_is_admitted_again() -> None:
    # Both compute the same prompt at once, so each has blocks of its own. Without them the later one would fit again
    # at once, beside the blocks of the earlier one that it can find; but its last token is still on its way.
    rig = with_capacity(blocks=12)
    rig.offer(rig.item(range(17), max_tokens=20))
    rig.offer(rig.item(range(17), max_tokens=20))
    while not rig.load().preemptions:
        rig.tick()
    preempting = rig.plans[-1]
    before = rig.plans[-2]
    assert [row.item for row in before.rows] == [1000, 2000]
    assert [row.item for row in preempting.rows] == [1000]
    assert preempting.admits == ()
    (admit,) = rig.must_launch().admits
    assert (admit.item, admit.tokens) == (2000, [*range(17), *rig.streams[2000].tokens])
    assert len(admit.blocks) == 5
    rig.run()
    rig.check_all()


def test_a_later_arrival_does_not_take_the_place_of_a_preempted_item() -> None:
    rig = with_capacity(blocks=12)
    rig.offer(rig.item(range(17), max_tokens=20))
    rig.offer(rig.item(range(17), max_tokens=20))
    while not rig.load().preemptions:
        if rig.load().blocks_used == 12 and 3000 not in rig.streams:
            rig.offer(rig.item([30], max_tokens=1))
        rig.tick()
    rig.run()
    order = [admit.item for plan in rig.plans for admit in plan.admits]
    assert order[:3] == [1000, 2000, 2000]
    assert 3000 in order
    rig.check_all()


def test_an_item_can_end_while_it_is_preempted() -> None:
    rig = with_capacity(blocks=5)
    rig.offer(rig.item(range(11), max_tokens=8))
    rig.offer(rig.item(range(20, 26), max_tokens=2))
    rig.run()
    rig.check_all()


def test_prompt_logprobs_come_once_although_the_prompt_is_computed_twice() -> None:
    rig = with_capacity(SchedulerConfig(token_budget=4), blocks=8)
    rig.offer(rig.item(range(4), max_tokens=24))
    for _ in range(12):
        rig.tick()
    rig.offer(rig.item(range(20, 36), max_tokens=2, prompt_logprobs=2, logprobs=1))
    rig.run()
    admits = [admit for plan in rig.plans for admit in plan.admits if admit.item == 2000]
    assert all(admit.blocks == () for admit in admits)
    rig.check_all()


@pytest.mark.parametrize("depth", [1, 2])
def test_many_in_a_tiny_pool_all_come_through(depth: int) -> None:
    rig = with_capacity(blocks=6, max_rows=6)
    for start in range(12):
        rig.offer(rig.item(range(start, start + 5), max_tokens=18))
    for _ in range(3000):
        if rig.launch() is None and not rig.in_flight:
            break
        if len(rig.in_flight) >= depth or rig.launch() is None:
            rig.settle()
        rig.check()
    rig.check_all()
    assert rig.load().preemptions > 0
