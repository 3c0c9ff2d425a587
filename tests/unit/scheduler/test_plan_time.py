"""Planning must not be felt beside a step of a few milliseconds: one millisecond at most, on one core."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

import pytest

from engines.protocol import Capacity, RowResult, StepPlan, StepResult
from server.scheduler.config import SchedulerConfig
from tests.unit.scheduler.rig import Rig

CAPACITY = Capacity(blocks=20_000, block_size=16, max_rows=256, max_step_tokens=2048, max_model_len=4096)
BAR = 1e-3
"""Seconds in the 99th percentile."""
SETTLE_BAR = 2e-3
"""All streams are of one age here, so in one step of sixteen each of them finishes a block, which is hashed then."""
ROUNDS = 15
"""A core that is shared is slow for a while: one quiet round shows what the code takes."""
STEPS = 100


@dataclass(frozen=True, slots=True)
class Times:
    """99th percentiles of one round, in seconds of this thread: the machine has other things to do."""

    plan: float
    settle: float


class Crowd:
    """All slots taken, 1,000 requests waiting, and two steps in flight."""

    def __init__(self, tenants: int) -> None:
        self.rig = Rig(SchedulerConfig(), {"m": CAPACITY})
        self.pending: list[StepPlan] = []
        for start in range(1256):
            wishes = {"ttft": 100.0, "tpot": 0.05, "firm": True, "tenant": str(start % tenants)}
            self.rig.offer(self.rig.item([start] * 48, max_tokens=2000, **wishes))

    def step(self) -> tuple[float, float]:
        """Seconds to plan a step and to settle the one before it."""
        rig = self.rig
        began = time.thread_time()
        plan = rig.scheduler.plan(rig.now, rig.capacities)
        planned = time.thread_time() - began
        assert plan is not None
        self.pending.append(plan)
        if len(self.pending) < 2:
            return planned, 0.0
        oldest = self.pending.pop(0)
        rows = [RowResult(item=row.item, tokens=[1] * row.max_new) for row in oldest.rows]
        result = StepResult(step=oldest.step, rows=rows, seconds=0.01)
        rig.now += 0.01
        began = time.thread_time()
        rig.scheduler.settle(result, rig.now)
        return planned, time.thread_time() - began

    def fill(self, residents: int) -> None:
        while not self.pending or len(self.pending[-1].rows) < residents:
            self.step()
        self.step()

    def round(self) -> Times:
        steps = [self.step() for _ in range(STEPS)]
        plans, settles = sorted(step[0] for step in steps), sorted(step[1] for step in steps)
        last = int(0.99 * (STEPS - 1))
        return Times(plans[last], settles[last])


@pytest.mark.parametrize("tenants", [1, 20])
def test_all_slots_taken_and_1000_waiting(tenants: int) -> None:
    residents = 256 if tenants == 1 else 255  # one is left for a tenant that has none
    crowd = Crowd(tenants)
    crowd.fill(residents)
    gc.collect()
    gc.freeze()
    best = Times(1.0, 1.0)
    for _ in range(ROUNDS):
        times = crowd.round()
        best = Times(min(best.plan, times.plan), min(best.settle, times.settle))
        if best.plan <= BAR and best.settle <= SETTLE_BAR:
            break
    gc.unfreeze()
    load = crowd.rig.load()
    assert (load.running, load.waiting) == (residents, 1256 - residents)
    print(f"plan {best.plan * 1e3:.3f} ms, settle {best.settle * 1e3:.3f} ms in the 99th percentile")  # noqa: T201
    assert best.plan <= BAR
    assert best.settle <= SETTLE_BAR
