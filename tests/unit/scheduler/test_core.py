"""Offers, several engines, tickets."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import msgspec
import pytest

from engines.protocol import StepResult
from server.scheduler.config import SchedulerConfig
from tests.unit.scheduler.rig import SMALL, Rig

TWO = {"m": SMALL, "other": SMALL}


class TestOffer:
    @pytest.mark.parametrize(
        ("prompt", "fields", "words"),
        [
            (5, {"engine": "absent"}, ["absent"]),
            (0, {}, ["empty"]),
            (128, {"max_tokens": 1}, ["128"]),
            (129, {"max_tokens": 0}, ["129", "128"]),
        ],
    )
    def test_what_can_never_run_is_refused(self, prompt: int, fields: dict[str, Any], words: list[str]) -> None:
        rig = Rig()
        reason = rig.scheduler.offer([rig.item(range(prompt), **fields)], rig.now)
        assert reason is not None
        assert all(word in reason for word in words)
        assert rig.launch() is None

    def test_the_longest_that_fits_is_taken(self) -> None:
        rig = Rig()
        rig.offer(rig.item(range(128), max_tokens=0))
        rig.offer(rig.item(range(127), max_tokens=1))
        rig.run()
        rig.check_all()

    @pytest.mark.parametrize("number", [math.nan, math.inf])
    @pytest.mark.parametrize("name", ["waited", "weight", "ttft", "tpot", "timeout"])
    @pytest.mark.parametrize("rows", [0, 1])
    def test_what_no_queue_can_be_ordered_by_is_refused(self, name: str, number: float, rows: int) -> None:
        rig = Rig()
        wishes: dict[str, Any] = {"rows": rows, name: number}
        item = rig.item([] if rows else range(3), **wishes)
        assert "finite" in str(rig.scheduler.offer([item], rig.now))

    def test_a_prompt_larger_than_the_pool_is_refused(self) -> None:
        rig = Rig(engines={"m": msgspec.structs.replace(SMALL, blocks=3)})
        reason = rig.scheduler.offer([rig.item(range(13))], rig.now)
        assert reason is not None
        assert "13" in reason
        assert "12" in reason
        rig.offer(rig.item(range(12), max_tokens=1))
        rig.run()
        rig.check_all()

    def test_a_request_is_taken_whole_or_not_at_all(self) -> None:
        rig = Rig()
        first, second = rig.group(range(5), 2)
        for broken in (
            [],
            [first, msgspec.structs.replace(second, tokens=[])],
            [first, msgspec.structs.replace(second, engine="other")],
            [first, msgspec.structs.replace(second, rows=1)],
            [first, first],
        ):
            assert rig.scheduler.offer(broken, rig.now) is not None
        assert rig.load().waiting == 0

    def test_an_id_that_is_still_here_is_refused(self) -> None:
        rig = Rig()
        item = rig.item(range(5), max_tokens=1)
        rig.offer(item)
        assert rig.scheduler.offer([item], rig.now) is not None
        rig.run()
        assert rig.scheduler.offer([item], rig.now) is None


class TestEngines:
    def test_those_with_work_take_turns(self) -> None:
        rig = Rig(engines=TWO)
        for engine, count in (("m", 3), ("other", 1)):
            for start in range(count):
                rig.offer(rig.item([start], max_tokens=6, engine=engine))
        rig.run()
        assert [plan.engine for plan in rig.plans] == ["m", "other"] * 6
        rig.check_all()

    def test_one_without_work_costs_the_other_nothing(self) -> None:
        rig = Rig(engines=TWO)
        rig.offer(rig.item(range(5), max_tokens=3, engine="other"))
        rig.run()
        assert [plan.engine for plan in rig.plans] == ["other"] * 3

    def test_removal_ends_its_items_and_leaves_the_others(self) -> None:
        rig = Rig(SchedulerConfig(max_batch=1), engines=TWO)
        rig.offer(rig.item(range(5), engine="m"))
        rig.offer(*rig.group(range(5), 2, engine="m"))
        rig.offer(rig.item([], 0, rows=1, engine="m"))
        rig.offer(rig.item(range(5), engine="other"))
        rig.must_launch()
        rig.must_launch()
        updates = rig.scheduler.remove_engine("m")
        assert {update.item: update.end for update in updates} == dict.fromkeys((1000, 2000, 2001, 3000), "error")
        assert [load.name for load in rig.scheduler.load()] == ["other"]
        # Its step in flight is settled as ever, and says nothing.
        del rig.capacities["m"]
        assert rig.settle() == []
        rig.run()
        assert rig.streams[4000].end == "length"
        assert rig.scheduler.offer([rig.item(range(5))], rig.now) is not None

    def test_names(self) -> None:
        rig = Rig()
        with pytest.raises(ValueError, match="m"):
            rig.scheduler.add_engine("m", SMALL, "")
        with pytest.raises(KeyError):
            rig.scheduler.remove_engine("absent")

    def test_a_name_can_be_used_again(self) -> None:
        rig = Rig()
        rig.offer(rig.item(range(9)))
        rig.must_launch()
        rig.scheduler.remove_engine("m")
        rig.scheduler.add_engine("m", SMALL, "new")
        assert rig.settle() == []
        assert rig.load().blocks_cached == 0


class TestTickets:
    def test_at_most_two_and_in_order(self) -> None:
        rig = Rig(engines=TWO)
        rig.offer(rig.item(range(5), engine="m"))
        rig.offer(rig.item(range(5), engine="other"))
        first, second = rig.must_launch(), rig.must_launch()
        assert rig.scheduler.in_flight == (first, second)
        assert second.step == first.step + 1
        assert rig.launch() is None
        with pytest.raises(ValueError, match="oldest"):
            rig.scheduler.settle(StepResult(step=second.step, rows=[], seconds=0.1), rig.now)

    def test_an_idle_scheduler_has_no_plan(self) -> None:
        rig = Rig()
        assert rig.launch() is None
        assert rig.scheduler.due() is None
        with pytest.raises(ValueError, match="oldest"):
            rig.scheduler.settle(StepResult(step=1, rows=[], seconds=0.1), rig.now)


def test_load_counts_what_integrity_found() -> None:
    rig = Rig()
    rig.offer(rig.item(range(9)))
    plan = rig.must_launch()
    assert rig.load().integrity_errors == 0
    # Behind the scheduler's back: its table of blocks loses an entry.
    lane = rig.scheduler._engines["m"].sequences
    state = next(iter(lane._residents))
    state.blocks.pop()
    found = Counter(text.split(":")[0] for text in rig.scheduler.integrity())
    assert set(found) == {"m"}
    assert rig.load().integrity_errors == found["m"]
    assert plan.rows[0].new_blocks


class TestConfigure:
    def loaded(self) -> Rig:
        rig = Rig(
            SchedulerConfig(max_batch=4), seconds=lambda plan: 0.003 + 0.001 * sum(row.count for row in plan.rows)
        )
        for number in range(8):
            rig.offer(rig.item(range(number + 2)))
            rig.offer(rig.one_shot(0, 2))
        rig.run()
        return rig

    def test_what_was_learned_and_counted_stays(self) -> None:
        rig = self.loaded()
        before, last = rig.load(), rig.plans[-1].step
        predicted = rig.scheduler._engines["m"].one_shot._queues[0].times.seconds(2)
        assert predicted > 0
        rig.scheduler.configure(SchedulerConfig(max_batch=1))
        after = rig.load()
        for name in (
            "decisions",
            "computed_tokens",
            "prefix_queries",
            "prefix_hits",
            "step_error_p50",
            "step_error_p95",
        ):
            assert getattr(before, name)
            assert getattr(after, name) == getattr(before, name)
        rig.offer(rig.item(range(10)))
        plan = rig.must_launch()
        assert plan.step == last + 1
        assert rig.scheduler._in_flight[0].work.seconds == pytest.approx(0.013, rel=0.1)
        rig.offer(rig.item(range(3)))
        rig.run()
        assert rig.load().running == 0
        assert max(len(plan.rows) for plan in rig.plans if plan.step > last) == 1
        assert rig.load().computed_tokens > before.computed_tokens
        assert rig.scheduler._engines["m"].one_shot._queues[0].times.seconds(2) == predicted
        rig.check()

    def test_another_policy_holds_from_then_on(self) -> None:
        rig = self.loaded()
        rig.scheduler.configure(SchedulerConfig(policy="static"))
        bound = sum(count for reason, count in rig.load().decisions.items() if reason.startswith("step bound"))
        rig.offer(rig.item(range(10)))
        rig.run()
        after = sum(count for reason, count in rig.load().decisions.items() if reason.startswith("step bound"))
        assert after == bound

    def test_all_items_are_forgotten(self) -> None:
        rig = Rig()
        items = [rig.item(range(5), suspect=number == 2) for number in range(12)]
        for item in items:
            rig.offer(item)
        rig.tick()
        while rig.in_flight:
            rig.settle()
        rig.scheduler.configure(SchedulerConfig())
        rig.check()
        assert rig.launch() is None
        assert (rig.load().running, rig.load().waiting, rig.load().blocks_used) == (0, 0, 0)
        assert rig.scheduler.offer([items[0]], rig.now) is None

    def test_not_while_steps_are_in_flight(self) -> None:
        rig = Rig()
        rig.offer(rig.item(range(5)))
        rig.must_launch()
        with pytest.raises(ValueError, match="in flight"):
            rig.scheduler.configure(SchedulerConfig())
        rig.run()
        rig.check_all()
