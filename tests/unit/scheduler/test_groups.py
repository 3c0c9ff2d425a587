"""``n`` choices of one prompt: computed once by the leader, found by the others."""

from __future__ import annotations

import msgspec
import pytest

from engines.protocol import StepPlan
from server.scheduler.config import SchedulerConfig
from tests.unit.scheduler.rig import SMALL, Rig


def starts(plan: StepPlan) -> dict[int, int]:
    """First computed position of each row, by choice."""
    return {row.item % 1000: row.start for row in plan.rows}


def test_siblings_wait_for_the_leader_then_match_its_full_blocks() -> None:
    rig = Rig()
    rig.offer(*rig.group(range(10), 3))
    assert starts(rig.must_launch()) == {0: 0}
    assert (rig.load().running, rig.load().waiting) == (1, 2)
    assert starts(rig.must_launch()) == {0: 10, 1: 8, 2: 8}
    # Two full blocks are shared; each row has the last partial one for itself.
    assert rig.load().blocks_used == 2 + 3
    rig.run()
    assert [stream.updates[0].cached_tokens for stream in rig.streams.values()] == [0, 8, 8]
    rig.check_all()


def test_a_chunked_prompt_is_waited_for_as_far_as_it_is_shared() -> None:
    rig = Rig(SchedulerConfig(token_budget=8))
    rig.offer(*rig.group(range(19), 2))
    rig.run()
    assert [starts(plan) for plan in rig.plans[:3]] == [{0: 0}, {0: 8}, {0: 16, 1: 16}]
    rig.check_all()


def test_a_leader_that_finds_the_whole_prompt_holds_nobody_up() -> None:
    rig = Rig()
    rig.offer(rig.item(range(10), max_tokens=1))
    rig.run()
    rig.offer(*rig.group(range(10), 3))
    assert starts(rig.must_launch()) == {0: 8, 1: 8, 2: 8}
    rig.run()
    rig.check_all()


@pytest.mark.parametrize("prompt", [1, 4])
def test_a_prompt_without_a_block_to_share_holds_nobody_up(prompt: int) -> None:
    rig = Rig()
    rig.offer(*rig.group(range(prompt), 3))
    assert starts(rig.must_launch()) == {0: 0, 1: 0, 2: 0}
    rig.run()
    rig.check_all()


def test_prompt_logprobs_are_computed_for_each() -> None:
    rig = Rig()
    rig.offer(*rig.group(range(10), 2, prompt_logprobs=1))
    assert starts(rig.must_launch()) == {0: 0, 1: 0}
    rig.run()
    rig.check_all()


@pytest.mark.parametrize("launched", [0, 1, 2])
def test_another_leads_when_the_leader_is_cancelled(launched: int) -> None:
    rig = Rig(SchedulerConfig(token_budget=4))
    rig.offer(*rig.group(range(18), 3))
    for _ in range(launched):
        rig.must_launch()
    rig.cancel(1000)
    rig.check()
    rig.run()
    rows = [row for plan in rig.plans for row in plan.rows]
    # The next one starts from what its predecessor left, and the last one waits for it.
    assert next(row.start for row in rows if row.item == 1001) == 4 * launched
    assert next(row.start for row in rows if row.item == 1002) == 16
    rig.check_all()


def test_a_parked_item_can_be_cancelled() -> None:
    rig = Rig()
    rig.offer(*rig.group(range(10), 3))
    rig.must_launch()
    rig.cancel(1001)
    assert starts(rig.must_launch()) == {0: 10, 2: 8}
    rig.run()
    rig.check_all()


def test_a_cancelled_item_never_leads() -> None:
    rig = Rig()
    rig.offer(*rig.group(range(10), 3))
    rig.cancel(1001)
    rig.cancel(1000)
    assert starts(rig.must_launch()) == {2: 0}
    rig.run()
    rig.check_all()


def test_all_can_be_cancelled_at_once() -> None:
    rig = Rig()
    rig.offer(*rig.group(range(10), 4))
    rig.must_launch()
    rig.cancel(1000, 1001, 1002, 1003)
    rig.run()
    rig.check_all()


def test_a_leader_that_ends_with_its_prompt_lets_the_others_go() -> None:
    rig = Rig(SchedulerConfig(max_batch=1))
    rig.offer(*rig.group(range(10), 3, max_tokens=1))
    rig.run()
    assert [starts(plan) for plan in rig.plans] == [{0: 0}, {1: 8}, {2: 8}]
    rig.check_all()


def test_a_leader_that_is_preempted_leads_on() -> None:
    rig = Rig(SchedulerConfig(token_budget=4), {"m": msgspec.structs.replace(SMALL, blocks=9)})
    rig.offer(rig.item(range(4), max_tokens=30))
    for _ in range(8):
        rig.tick()
    rig.offer(*rig.group(range(20, 36), 2, max_tokens=8))
    rig.run()
    assert rig.load().preemptions > 0
    rig.check_all()
