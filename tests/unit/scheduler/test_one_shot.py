"""Items that end after one step. The rig's engine takes 8 rows."""

from __future__ import annotations

import pytest

from server.scheduler.config import SchedulerConfig
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
