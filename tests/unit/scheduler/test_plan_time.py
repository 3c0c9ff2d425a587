"""Planning must not be felt beside a step of a few milliseconds."""

from __future__ import annotations

import time

from engines.protocol import Capacity, RowResult, StepPlan, StepResult
from server.scheduler.config import SchedulerConfig
from tests.unit.scheduler.rig import Rig

CAPACITY = Capacity(blocks=20_000, block_size=16, max_rows=256, max_step_tokens=2048, max_model_len=4096)


def test_256_residents_and_1000_waiting() -> None:
    rig = Rig(SchedulerConfig(target_ttft=2.0, target_tpot=0.05), {"m": CAPACITY})
    for start in range(1256):
        rig.offer(rig.item([start] * 48, max_tokens=1000))
    best = [60.0, 60.0]
    pending: list[StepPlan] = []
    for _ in range(150):
        begin = time.perf_counter()
        plan = rig.scheduler.plan(rig.now, rig.capacities)
        planned = time.perf_counter()
        assert plan is not None
        pending.append(plan)
        if len(pending) < 2:
            continue
        oldest = pending.pop(0)
        rows = [RowResult(item=row.item, tokens=[1] * row.max_new) for row in oldest.rows]
        settle = time.perf_counter()
        rig.scheduler.settle(StepResult(step=oldest.step, rows=rows, seconds=0.01), rig.now)
        if len(oldest.rows) == 256:
            best = [min(best[0], planned - begin), min(best[1], time.perf_counter() - settle)]
    assert (rig.load().running, rig.load().waiting) == (256, 1000)
    # Measured 0.35 and 0.4 ms; the best of many is steady on a busy machine, the bound leaves room for a slow one.
    assert max(best) < 2e-3
