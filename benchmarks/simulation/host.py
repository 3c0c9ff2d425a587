"""What the worker's loop itself costs a step on this machine: planning, settling and packing the outputs."""

from __future__ import annotations

import statistics
import time

from benchmarks.simulation.coefficients import HostCosts
from engines.protocol import Capacity, RowResult, SamplingParams, StepPlan, StepResult
from server.scheduler.config import SchedulerConfig
from server.scheduler.core import DynamicBatchScheduler
from server.worker.wire import Item, StepOutputs, StepStats, encode

FEW, MANY = 8, 256
"""Rows between which the cost is taken to be linear."""
ROUNDS = 300


def measure_host() -> HostCosts:
    few, many = _seconds(FEW), _seconds(MANY)
    row = max(0.0, many - few) / (MANY - FEW)
    return HostCosts(step=max(0.0, few - FEW * row), row=row)


def _seconds(rows: int) -> float:
    """Median of one round with so many decodes."""
    capacity = Capacity(
        blocks=100_000, block_size=16, max_rows=rows, max_step_tokens=max(2048, rows), max_model_len=8192
    )
    scheduler = DynamicBatchScheduler(SchedulerConfig())
    scheduler.add_engine("m", capacity, "host")
    for number in range(rows):
        item = Item(
            item=number,
            request=number,
            engine="m",
            tokens=[number] * 256,
            prompt_length=256,
            max_tokens=4096,
            sampling=SamplingParams(seed=number),
        )
        scheduler.offer([item], 0.0)
    now = 0.0
    taken: list[float] = []
    while len(taken) < ROUNDS:
        began = time.perf_counter()
        plan = scheduler.plan(now, {"m": capacity})
        assert plan is not None
        planned = time.perf_counter() - began
        now += 0.01
        settled = _settle(scheduler, plan, now)
        if len(plan.rows) == rows and all(row.count == 1 for row in plan.rows):
            taken.append(planned + settled)
    return statistics.median(taken)


def _settle(scheduler: DynamicBatchScheduler, plan: StepPlan, now: float) -> float:
    rows = [RowResult(item=row.item, tokens=[7] * row.max_new) for row in plan.rows]
    result = StepResult(step=plan.step, rows=rows, seconds=0.01)
    began = time.perf_counter()
    updates = scheduler.settle(result, now)
    encode(
        StepOutputs(
            incarnation=0,
            engine="m",
            step=plan.step,
            items=[update.item for update in updates],
            first_index=[update.first_index for update in updates],
            tokens=[update.tokens for update in updates],
            ends=[update.end for update in updates],
            cached_tokens=[update.cached_tokens for update in updates],
            queue_seconds=[update.queue_seconds for update in updates],
            stats=StepStats(seconds=0.01, plan_seconds=0.0, rows=len(rows), tokens=len(rows), prompt_tokens=0),
        )
    )
    return time.perf_counter() - began
