"""The policies that are compared: one scheduler, with other settings or with single parts of its law switched off."""

from __future__ import annotations

from dataclasses import dataclass, replace

from server.scheduler.config import SchedulerConfig
from server.scheduler.core import DynamicBatchScheduler
from server.scheduler.law import LAWS, Law


@dataclass(frozen=True, slots=True)
class Policy:
    """``aims`` tells the scheduler each request's targets, and that they are firm."""

    name: str
    law: Law
    budget: int | None = None
    """Tokens a step; None takes what the device can do."""
    queue_cap: int = 0
    """Requests without a first token at which the next one is refused; 0 refuses none."""
    aims: bool = True
    door: bool = False
    """The server's own door refuses by its prediction, before the scheduler hears of a request."""

    def scheduler(self) -> DynamicBatchScheduler:
        return DynamicBatchScheduler(SchedulerConfig(token_budget=self.budget), self.law)


def first_come(budget: int, queue_cap: int) -> Policy:
    """First come, first served with a fixed number of tokens a step."""
    name = f"static {budget}" + (f", queue of {queue_cap}" if queue_cap else "")
    return Policy(name, LAWS["static"], budget, queue_cap, aims=False)


def fixed_budget(budget: int) -> Policy:
    """All of our law but its budget: deadlines, late drop, classes and fairness with fixed tokens a step."""
    return Policy(f"static {budget}, deadlines, drop", replace(LAWS["adaptive"], budget="fixed"), budget)


def _ours(without: str, law: Law, door: bool = True) -> Policy:
    return Policy(f"ours, {without}", law, door=door)


AIMD = Policy("aimd", LAWS["aimd"])
OURS = Policy("ours", LAWS["adaptive"], door=True)
WITHOUT = (
    _ours("no door", LAWS["adaptive"], door=False),
    _ours("first come first served", replace(LAWS["adaptive"], deadline_order=False)),
    _ours("no late drop", replace(LAWS["adaptive"], late_drop=False)),
    _ours("no adaptive budget", replace(LAWS["adaptive"], budget="fixed")),
    _ours("no fairness", replace(LAWS["adaptive"], fairness=False)),
    _ours("no priorities", replace(LAWS["adaptive"], priorities=False)),
)
"""Ours minus each part."""
