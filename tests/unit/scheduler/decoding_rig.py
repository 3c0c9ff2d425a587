"""Eight streams that decode on a machine whose step times are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engines.protocol import Capacity, StepPlan
from server.scheduler.config import SchedulerConfig
from server.scheduler.step_time import attended_pairs
from tests.unit.scheduler.rig import Rig

LARGE = Capacity(blocks=4000, block_size=16, max_rows=32, max_step_tokens=1024, max_model_len=8000)


def machine(plan: StepPlan) -> float:
    """10 ms a step and 0.1 ms a token."""
    return 0.010 + 1e-4 * sum(row.count for row in plan.rows)


def machine_with_attention(plan: StepPlan) -> float:
    """The same, and 1 us a pair."""
    return machine(plan) + 1e-6 * sum(attended_pairs(row.start, row.count) for row in plan.rows)


def slow_machine(plan: StepPlan) -> float:
    """No step with eight streams takes less than 100 ms."""
    return 10 * machine(plan)


def rig_with_decodes(
    config: SchedulerConfig,
    max_tokens: int = 2000,
    seconds: Callable[[StepPlan], float] = machine,
    **fields: Any,
) -> Rig:
    """Eight residents that decode, after enough steps to know the machine."""
    rig = Rig(config, {"m": LARGE}, seconds)
    for start in range(8):
        rig.offer(rig.item([start] * (20 + 40 * start), max_tokens=max_tokens, **fields))
        for _ in range(3):
            rig.tick()
    for _ in range(30):
        rig.tick()
    while rig.in_flight:
        rig.settle()
    return rig


def chunk(rig: Rig, length: int = 3000, **fields: Any) -> int:
    """Tokens that the next step takes of a long new prompt."""
    rig.offer(rig.item([9] * length, **fields))
    return rig.must_launch().rows[-1].count
