"""The two policies to compare with, and the parts of ours that can be switched off."""

from __future__ import annotations

from engines.protocol import Capacity
from server.scheduler.aimd import INTERVAL, LEAST, AimdBudget
from server.scheduler.config import SchedulerConfig
from server.scheduler.core import DynamicBatchScheduler
from server.scheduler.law import LAWS, Law
from tests.unit.scheduler.rig import Rig

LARGE = Capacity(blocks=4000, block_size=16, max_rows=64, max_step_tokens=1024, max_model_len=4000)


class TestAimd:
    def adapt(self, ratio: float, waiting: int, times: int = 1, most: int = 256) -> int:
        """Tokens of a step after answers that took ``ratio`` of their target, while eight run."""
        budget = AimdBudget(1024)
        budget.tokens = most
        for turn in range(times):
            budget.observe(ratio)
            budget.adapt(turn * INTERVAL, waiting, 8)
        return budget.tokens

    def test_it_halves_when_answers_are_slow_and_the_queue_is_short(self) -> None:
        assert self.adapt(1.3, waiting=2) == 128
        assert self.adapt(1.3, waiting=20) == 256

    def test_it_doubles_when_answers_are_fast_and_the_queue_is_long(self) -> None:
        assert self.adapt(0.7, waiting=20) == 512
        assert self.adapt(0.7, waiting=2) == 256

    def test_between_the_two_it_stays(self) -> None:
        assert self.adapt(0.9, waiting=20) == self.adapt(1.1, waiting=2) == 256

    def test_it_stays_in_bounds(self) -> None:
        assert self.adapt(9.0, waiting=0, times=9) == LEAST
        assert self.adapt(0.1, waiting=99, times=9) == 1024

    def test_it_changes_once_in_an_interval(self) -> None:
        budget = AimdBudget(1024)
        for now, tokens in ((100.0, 512), (100.0 + INTERVAL / 2, 512), (100.0 + INTERVAL, 256)):
            budget.observe(2.0)
            budget.adapt(now, 0, 8)
            assert budget.tokens == tokens

    def test_it_bounds_steps(self) -> None:
        rig = Rig(SchedulerConfig(policy="aimd", target_ttft=0.001), {"m": LARGE})
        for number in range(40):
            rig.offer(rig.item([number] * 100, 4))
            for _ in range(30):
                rig.tick()
        assert rig.load().token_budget < 1024
        rig.run()
        rig.check_all()


def test_static_knows_no_time_and_no_targets() -> None:
    law = LAWS["static"]
    assert law == Law(deadline_order=False, late_drop=False, budget="fixed", fairness=False, priorities=False)
    rig = Rig(SchedulerConfig(policy="static", token_budget=100), {"m": LARGE}, seconds=lambda plan: 5.0)
    for ttft in (0.1, 0.01):
        rig.offer(rig.item([1] * 150, 3, ttft=ttft, tpot=0.01, firm=True))
    assert sum(row.count for row in rig.must_launch().rows) == 100
    assert sum(row.count for row in rig.must_launch().rows) == 100
    rig.run()
    assert rig.dropped == []
    rig.check_all()


def test_a_law_goes_before_the_policy_and_the_default_is_adaptive() -> None:
    assert DynamicBatchScheduler(SchedulerConfig())._law == LAWS["adaptive"] == Law()
    assert DynamicBatchScheduler(SchedulerConfig(policy="aimd"))._law == LAWS["aimd"]
    law = Law(deadline_order=False)
    assert DynamicBatchScheduler(SchedulerConfig(policy="static"), law)._law is law
