"""Each decision is counted under its reason, here those that no other test of a rule looks at."""

from __future__ import annotations

import ast
import math
from collections import Counter
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from engines.protocol import Capacity, Irregular, StepPlan
from server.scheduler import budget, outliers
from server.scheduler.aimd import Change
from server.scheduler.class_shares import AGEING
from server.scheduler.config import SchedulerConfig
from server.scheduler.items import StepWork
from server.scheduler.residents import IMMUNE
from server.scheduler.step_time import WARM, StepTimeModel
from tests.unit.scheduler.rig import Rig, with_capacity

LARGE = Capacity(blocks=4000, block_size=16, max_rows=64, max_step_tokens=256, max_model_len=4000)


def decisions(rig: Rig) -> Counter[str]:
    return Counter(rig.load().decisions)


def machine(plan: StepPlan) -> float:
    """2 ms a step and 0.1 ms a token or a row."""
    return 0.002 + 1e-4 * (sum(row.count for row in plan.rows) + sum(row.rows for row in plan.one_shot))


class TestAimd:
    """Its size begins at all that the engine can do, and changes at most once in half a second."""

    def rig(self) -> Rig:
        """Every answer is slow."""
        config = SchedulerConfig(policy="aimd", max_batch=8, target_ttft=0.001)
        return Rig(config, {"m": LARGE}, lambda plan: 0.2)

    def serve(self, rig: Rig, requests: int) -> Counter[str]:
        for number in range(requests):
            rig.offer(rig.item([number] * 8, 4))
        rig.run()
        rig.check_all()
        return decisions(rig)

    def test_slow_answers_halve_it_down_to_its_least(self) -> None:
        rig = self.rig()
        for _ in range(10):
            found = self.serve(rig, 2)
        # 256, 128, 64, 32 and no less.
        assert found["step halved"] == 3
        assert found["step held at its least"] >= 3
        assert not found["step doubled"] + found["step held at its most"]

    def test_fast_answers_double_it_up_to_its_most(self) -> None:
        rig = self.rig()
        self.serve(rig, 2)
        self.serve(rig, 2)
        halved = decisions(rig)["step halved"]
        assert halved
        generous = SchedulerConfig(policy="aimd", max_batch=8, target_ttft=1e6, target_tpot=1e6)
        rig.scheduler.configure(generous)
        rig.scheduler._engines["m"].sequences._planner.aimd.tokens = 64
        found = self.serve(rig, 200)
        assert found["step doubled"] == 2
        assert found["step held at its most"] >= 2
        assert found["step halved"] == halved


def test_a_decode_that_finds_no_block() -> None:
    rig = with_capacity(SchedulerConfig(prefix_cache=False), blocks=13)
    for start in range(3):
        rig.offer(rig.item(range(10 * start, 10 * start + 6), max_tokens=24))
    rig.must_launch()
    residents = rig.scheduler._engines["m"].sequences._residents
    assert len(residents) == 3
    # From those that gave way twice only the most senior may take.
    for state in residents:
        state.preempted = IMMUNE
    rig.run()
    rig.check_all()
    assert decisions(rig)["decode waits for blocks"] > 0
    assert sum(len(plan.rows) == 2 for plan in rig.plans) > 0


class TestPromptsCut:
    def test_by_the_tokens_of_a_step(self) -> None:
        rig = Rig(SchedulerConfig(policy="static"), {"m": LARGE}, machine)
        rig.offer(rig.item([1] * 600, 2))
        rig.run()
        assert decisions(rig) == {"admitted": 1, "prompts cut by tokens": 2}

    def test_of_those_that_are_not_begun_too(self) -> None:
        rig = Rig(SchedulerConfig(policy="static"), {"m": LARGE}, machine)
        rig.offer(rig.item([1] * 256, 2))
        rig.offer(rig.item([2] * 10, 2))
        rig.run()
        assert decisions(rig) == {"admitted": 2, "prompts cut by tokens": 1}

    def test_by_a_deadline(self) -> None:
        rig = self.beside_a_stream()
        rig.offer(rig.item([2] * 200, 2))
        while rig.streams[2000].end == "":
            rig.tick()
        found = decisions(rig)
        # 10 ms a token leave 80 prompt tokens a step.
        assert 2 <= found["prompts cut by time"] <= 4
        assert not found["prompts cut by tokens"] + found["prompts cut by trust"]

    def test_by_predictions_that_do_not_reach_further(self) -> None:
        capacity = Capacity(blocks=4000, block_size=16, max_rows=64, max_step_tokens=2048, max_model_len=4000)
        rig = Rig(SchedulerConfig(target_ttft=60.0), {"m": capacity}, machine)
        rig.offer(rig.item([1] * 2000, 1))
        rig.must_launch()
        assert decisions(rig)["prompts cut by trust"] == 1

    def test_not_where_all_of_them_fit(self) -> None:
        rig = self.beside_a_stream()
        rig.offer(rig.item([2] * 20, 2))
        rig.run()
        assert not [reason for reason in decisions(rig) if reason.startswith("prompts cut")]

    def test_not_where_a_slot_is_what_is_missing(self) -> None:
        rig = Rig(SchedulerConfig(max_batch=1), {"m": LARGE}, machine)
        for number in range(3):
            rig.offer(rig.item([number] * 20, 4))
        rig.run()
        assert decisions(rig)["waits for a slot"] > 0
        assert not [reason for reason in decisions(rig) if reason.startswith("prompts cut")]

    @staticmethod
    def beside_a_stream() -> Rig:
        """One stream that wants a token every 10 ms, and a model that has learned the machine."""
        rig = Rig(SchedulerConfig(target_tpot=0.01, prefix_cache=False), {"m": LARGE}, machine)
        for number in range(12):
            rig.offer(rig.item([number] * (10 + 20 * number), 3, tpot=1.0))
            rig.run()
        rig._requests = 0
        rig.streams.clear()
        before = rig.load().decisions
        rig.offer(rig.item([1] * 8, 400))
        for _ in range(60):
            rig.tick()
        assert decisions(rig)["prompts cut by time"] == before.get("prompts cut by time", 0) == 0
        return rig


class TestAgeing:
    def test_a_sequence_that_waited_long_goes_before_a_higher_class(self) -> None:
        rig = Rig(SchedulerConfig(max_batch=1))
        rig.offer(rig.item([1], max_tokens=4))
        rig.must_launch()
        rig.offer(rig.item([2], max_tokens=1, priority="low", waited=2 * AGEING + 1))
        rig.offer(rig.item([3], max_tokens=1, priority="normal", ttft=900.0))
        rig.offer(rig.item([4], max_tokens=1, priority="low"))
        rig.run()
        order = [admit.item // 1000 for plan in rig.plans for admit in plan.admits]
        assert order == [1, 2, 3, 4]
        assert decisions(rig)["admitted by its age"] == 1
        assert decisions(rig)["admitted"] == 3

    def test_one_that_waited_as_long_and_is_alone_overtakes_nobody(self) -> None:
        rig = Rig()
        rig.offer(rig.item([2], max_tokens=1, priority="low", waited=2 * AGEING + 1))
        rig.run()
        assert decisions(rig)["admitted"] == 1
        assert not decisions(rig)["admitted by its age"]

    def test_a_one_shot_item_that_waited_long(self) -> None:
        rig = Rig(SchedulerConfig(max_batch=2))
        for priority, waited in (("low", 2 * AGEING + 1), ("normal", 0.0), ("high", 0.0)):
            rig.offer(rig.item([], 0, rows=1, priority=priority, waited=waited))
        rig.must_launch()
        # It shares a step with one of a higher class and leaves another one behind.
        assert [row.item // 1000 for row in rig.plans[0].one_shot] == [1, 3]
        assert decisions(rig)["admitted by its age"] == 1


def test_choices_that_wait_for_their_siblings_prompt() -> None:
    rig = Rig()
    rig.offer(*rig.group(range(10), 3))
    assert decisions(rig)["parked behind a sibling"] == 2
    # A prompt without a full block has nothing to share.
    rig.offer(*rig.group(range(2), 3))
    assert decisions(rig)["parked behind a sibling"] == 2
    rig.run()
    rig.check_all()


def test_one_whose_step_is_in_flight_keeps_its_place() -> None:
    rig = with_capacity(blocks=12)
    rig.offer(rig.item(range(17), max_tokens=20))
    rig.offer(rig.item(range(17), max_tokens=20))
    while not rig.load().preemptions:
        rig.tick()
    rig.run()
    assert decisions(rig)["waits for its step in flight"] > 0


def test_a_batch_that_waits_for_company() -> None:
    rig = Rig(SchedulerConfig(max_delay=0.005))
    assert rig.launch() is None
    assert not decisions(rig)
    rig.offer(rig.one_shot(0, 1))
    assert rig.launch() is None
    assert decisions(rig) == {"batch waits for company": 1}


REASONS: list[Irregular] = ["compile", "capture", "swap"]


class TestStepsNotLearned:
    def model(self, rig: Rig) -> StepTimeModel:
        return rig.scheduler._engines["m"].sequences.step_time

    def predictions(self, rig: Rig) -> list[float]:
        """What the coefficients make of some steps, and how far predictions were off."""
        model = self.model(rig)
        sizes = ((1, 1), (8, 8), (1, 200), (8, 250))
        times = [
            model.predict(StepWork(rows=rows, tokens=tokens, decode_pairs=900.0 * rows, prompt_pairs=90.0 * tokens))
            for rows, tokens in sizes
        ]
        return [*times, model.safety, model.bias, *model.errors.quantiles()]

    def trained(self) -> Rig:
        rig = Rig(SchedulerConfig(prefix_cache=False), {"m": LARGE}, machine)
        for number in range(8):
            rig.offer(rig.item([number] * (5 + 30 * number), 8))
            rig.run()
        return rig

    @pytest.mark.parametrize("reason", REASONS)
    def test_an_irregular_step_of_sequences_teaches_nothing(self, reason: Irregular) -> None:
        rig = self.trained()
        before, largest = self.predictions(rig), self.model(rig).largest
        # Not so far off that the time itself would give it away.
        rig._seconds = lambda plan: 3 * machine(plan)
        rig.offer(rig.item([9] * 256, 1))
        rig.must_launch()
        rig.settle(irregular=reason)
        assert rig.streams[9000].end == "length"
        assert self.predictions(rig) == before
        assert self.model(rig).largest == largest < 256
        assert decisions(rig)[f"step not learned: {reason}"] == 1
        # The very same step without that teaches.
        rig.offer(rig.item([8] * 256, 1))
        rig.must_launch()
        rig.settle()
        assert self.predictions(rig) != before
        assert sum(count for name, count in decisions(rig).items() if name.startswith("step not learned")) == 1

    def test_irregular_steps_alone_never_make_it_warm(self) -> None:
        rig = Rig(SchedulerConfig(), {"m": LARGE}, machine)
        rig.offer(rig.item([1] * 9, 3 * WARM))
        while rig.launch() is not None:
            rig.settle(irregular="compile")
        assert not self.model(rig).warm
        assert decisions(rig)["step not learned: compile"] == 3 * WARM

    @pytest.mark.parametrize("reason", REASONS)
    def test_an_irregular_step_of_a_bucket_teaches_nothing(self, reason: Irregular) -> None:
        rig = Rig(SchedulerConfig(), {"m": LARGE}, machine)
        for rows in (1, 2, 4, 8):
            rig.offer(rig.one_shot(0, rows))
            rig.run()
        lane = rig.scheduler._engines["m"].one_shot
        times = lane._queues[0].times
        before = [times.seconds(rows) for rows in (1, 8, 64)], lane.errors.quantiles()
        rig._seconds = lambda plan: 3 * machine(plan)
        rig.offer(rig.one_shot(0, 6))
        rig.must_launch()
        rig.settle(irregular=reason)
        assert ([times.seconds(rows) for rows in (1, 8, 64)], lane.errors.quantiles()) == before
        assert decisions(rig)[f"step not learned: {reason}"] == 1

    @pytest.mark.parametrize(
        ("seconds", "reason"), [(0.0, "no time"), (-1.0, "no time"), (math.nan, "no time"), (900.0, "far off")]
    )
    @pytest.mark.parametrize("rows", [0, 1])
    def test_what_cannot_be_the_time_of_a_step_is_counted_too(self, rows: int, seconds: float, reason: str) -> None:
        rig = Rig(SchedulerConfig(), {"m": LARGE}, machine)
        for _ in range(WARM + 1):
            rig.offer(rig.one_shot(0, rows) if rows else rig.item([1], 1))
            rig.run()
        rig.offer(rig.one_shot(0, rows) if rows else rig.item([1], 1))
        plan = rig.must_launch()
        result = rig.engines["m"].collect(plan.step)
        rig.scheduler.settle(msgspec.structs.replace(result, seconds=seconds), rig.now)
        assert decisions(rig)[f"step not learned: {reason}"] == 1


def test_the_operators_table_names_every_reason() -> None:
    root = Path(__file__).parents[3]
    reasons = {
        name.value
        for path in (root / "server" / "scheduler").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "decisions"
        for name in ([node.slice.body, node.slice.orelse] if isinstance(node.slice, ast.IfExp) else [node.slice])
        if isinstance(name, ast.Constant) and isinstance(name.value, str)
    }
    assert {"first token late", "first token in time", "waits for a slot", "parked behind a sibling"} <= reasons
    for start, ends in (
        ("prompts cut by", get_args(budget.Bound)),
        ("step", get_args(Change)),
        ("step not learned:", (*get_args(outliers.Ignored), *get_args(Irregular))),
        ("step bound by", ("pace", "backlog", "slack", "behind", "stretch", "idle")),
        ("batch bound by", ("its size", "a deadline", "what waits")),
        ("preempted for", ("blocks", "a higher class", "a suspect")),
        ("admitted by", ("its class's floor", "its age")),
        ("dropped", ("late",)),
    ):
        reasons |= {f"{start} {end}" for end in ends if end}
    text = (root / "docs" / "operations.md").read_text()
    assert [reason for reason in sorted(reasons) if f"`{reason}`" not in text] == []
