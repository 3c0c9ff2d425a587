"""Planning must not be felt beside a step of a few milliseconds: one millisecond at most, on one core."""

from __future__ import annotations

import gc
import time

import pytest

from engines.protocol import Capacity, RowResult, StepPlan, StepResult
from server.scheduler.config import SchedulerConfig
from tests.unit.scheduler.rig import Rig

CAPACITY = Capacity(blocks=20_000, block_size=16, max_rows=256, max_step_tokens=2048, max_model_len=4096)


@pytest.mark.parametrize("tenants", [1, 20])
def test_all_slots_taken_and_1000_waiting(tenants: int) -> None:
    rig = Rig(SchedulerConfig(), {"m": CAPACITY})
    for start in range(1256):
        wishes = {"ttft": 100.0, "tpot": 0.05, "firm": True, "tenant": str(start % tenants)}
        rig.offer(rig.item([start] * 48, max_tokens=1000, **wishes))
    residents = 256 if tenants == 1 else 255  # one is left for a tenant that has none
    plans: list[float] = []
    settles: list[float] = []
    pending: list[StepPlan] = []
    gc.collect()
    gc.freeze()  # as the worker does
    for _ in range(400):
        # Time of this thread, not of the wall: the machine that tests has other things to do.
        begin = time.thread_time()
        plan = rig.scheduler.plan(rig.now, rig.capacities)
        planned = time.thread_time()
        assert plan is not None
        pending.append(plan)
        if len(pending) < 2:
            continue
        oldest = pending.pop(0)
        rows = [RowResult(item=row.item, tokens=[1] * row.max_new) for row in oldest.rows]
        rig.now += 0.01
        settle = time.thread_time()
        rig.scheduler.settle(StepResult(step=oldest.step, rows=rows, seconds=0.01), rig.now)
        if len(oldest.rows) == residents:
            settles.append(time.thread_time() - settle)
            plans.append(planned - begin)
    gc.unfreeze()
    assert (rig.load().running, rig.load().waiting) == (residents, 1256 - residents)
    assert len(plans) > 300
    # Measured 0.6 and 0.5 ms in the 99th percentile; the bounds leave room for a slower or a shared core.
    for name, times, most in (("plan", plans, 2e-3), ("settle", settles, 2e-3)):
        times.sort()
        p50, p99 = times[len(times) // 2] * 1e3, times[int(0.99 * len(times))] * 1e3
        print(f"{name}: p50 {p50:.3f} ms, p99 {p99:.3f} ms with {tenants} tenants")  # noqa: T201
        assert p99 < most * 1e3
