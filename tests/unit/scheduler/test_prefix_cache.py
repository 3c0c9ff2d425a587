"""Blocks are found again by their content. The rig has blocks of 4 tokens, 8 rows, 64 tokens a step."""

from __future__ import annotations

from typing import Any

import pytest

from server.scheduler.config import SchedulerConfig
from tests.unit.scheduler.rig import SMALL, Rig, shape, with_capacity


def test_a_hit_computes_only_the_rest() -> None:
    rig = Rig()
    rig.offer(rig.item(range(14), max_tokens=2))
    rig.run()
    rig.offer(rig.item([*range(14), 40, 41], max_tokens=2))
    assert shape(rig.launch()) == [(12, 4, 1)]
    rig.run()
    assert [stream.updates[0].cached_tokens for stream in rig.streams.values()] == [0, 12]
    assert (rig.load().prefix_queries, rig.load().prefix_hits) == (30, 12)
    rig.check_all()


def test_a_full_hit_still_computes_the_last_block() -> None:
    rig = Rig()
    for _ in range(2):
        rig.offer(rig.item(range(16), max_tokens=2))
        rig.run()
    assert shape(rig.plans[2]) == [(12, 4, 1)]


def test_output_is_found_again_by_the_next_turn() -> None:
    rig = Rig()
    rig.offer(rig.item(range(6), max_tokens=10))
    rig.run()
    turn = [*range(6), *rig.streams[1000].tokens, 45, 46]
    rig.offer(rig.item(turn, max_tokens=2))
    assert shape(rig.launch()) == [(12, 6, 1)]
    rig.run()
    rig.check_all()


def test_a_block_is_findable_in_the_next_plan_not_in_the_same() -> None:
    rig = Rig()
    rig.offer(rig.item(range(9)))
    rig.offer(rig.item(range(9)))
    assert shape(rig.launch()) == [(0, 9, 1), (0, 9, 1)]
    rig.offer(rig.item(range(9)))
    # The step that writes them is launched and not settled.
    assert shape(rig.launch()) == [(9, 1, 1), (9, 1, 1), (8, 1, 1)]
    rig.run()
    rig.check_all()


@pytest.mark.parametrize("fields", [{"cache_salt": "tenant"}, {"prompt_logprobs": 0}])
def test_other_salts_and_prompt_logprobs_take_no_hit(fields: dict[str, Any]) -> None:
    rig = Rig()
    rig.offer(rig.item(range(9)))
    rig.run()
    rig.offer(rig.item(range(9), **fields))
    assert shape(rig.launch()) == [(0, 9, 1)]
    rig.run()
    rig.check_all()


def test_engines_share_nothing() -> None:
    rig = Rig(engines={"m": SMALL, "other": SMALL})
    rig.offer(rig.item(range(9), max_tokens=1))
    rig.run()
    rig.offer(rig.item(range(9), max_tokens=1, engine="other"))
    assert shape(rig.launch()) == [(0, 9, 1)]


def test_off_means_off() -> None:
    rig = Rig(SchedulerConfig(prefix_cache=False))
    for _ in range(2):
        rig.offer(*rig.group(range(9), 2))
        rig.run()
    assert shape(rig.plans[0])[0] == (0, 9, 1)
    assert (rig.load().prefix_queries, rig.load().prefix_hits, rig.load().blocks_cached) == (0, 0, 0)
    rig.check_all()


def test_cached_blocks_are_reused_when_nothing_is_free() -> None:
    rig = with_capacity(blocks=6)
    rig.offer(rig.item(range(16), max_tokens=2))
    rig.run()
    assert (rig.load().blocks_used, rig.load().blocks_cached, rig.load().blocks_total) == (0, 4, 6)
    rig.offer(rig.item(range(20, 41), max_tokens=2))
    rig.run()
    assert rig.load().blocks_cached == 5
    rig.offer(rig.item(range(16), max_tokens=1))
    assert shape(rig.launch()) == [(0, 16, 1)]
    rig.run()
    rig.check_all()
