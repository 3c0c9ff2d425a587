"""Coordinate descent over the configurations of a step's linear layers: one layer's is changed at a time, and the whole
step is timed. What is fastest alone is often not so in the step, where kernels overlap with the ones around them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

from engines.kernels.cuda.tuning import Machine, SkinnyConfig, SkinnyShape, Table, fields_of, predicted_us, ranked

Choice: TypeAlias = SkinnyConfig | None
"""None: cuBLAS."""
Assignment: TypeAlias = dict[SkinnyShape, Choice]
"""What each layer of a step runs."""

MARGIN = 0.003
"""A change must be faster by this share, twice."""
PREFETCHED = (0, 32 << 10, 96 << 10, 256 << 10)
"""Bytes of a program's weights asked for ahead, to try."""
BROAD_LINES = 65_536
"""Layers of more are the head, once in a step and far from all others: half the candidates do."""


class Timer(Protocol):
    def measure(self, assignment: Assignment, limit: float) -> float:
        """Microseconds of the step; a rough figure is enough if it is far above ``limit``."""

    def compare(self, first: Assignment, second: Assignment) -> tuple[float, float]:
        """Microseconds of both, taken in turns."""


@dataclass
class Descent:
    """Of one number of rows. ``best`` and its ``us`` are the state; ``tried`` what was learnt on the way."""

    timer: Timer
    best: Assignment
    us: float
    tried: dict[SkinnyShape, dict[Choice, float]] = field(default_factory=dict)
    """Time of the step with that choice, as a share of the best one's at that moment."""

    def offer(self, shape: SkinnyShape, choice: Choice) -> bool:
        """Try a change; whether it was taken."""
        if self.best[shape] == choice:
            return False
        trial = self.best | {shape: choice}
        us = self.timer.measure(trial, self.us)
        self.tried.setdefault(shape, {})[choice] = us / self.us
        if us >= self.us * (1 - MARGIN):
            return False
        before, after = self.timer.compare(self.best, trial)
        self.us = before
        if after >= before * (1 - MARGIN):
            return False
        self.best, self.us = trial, after
        return True

    def runners_up(self, shape: SkinnyShape, count: int) -> list[Choice]:
        """The fastest of what was tried and not taken."""
        found = {choice: share for choice, share in self.tried.get(shape, {}).items() if choice != self.best[shape]}
        return sorted(found, key=found.__getitem__)[:count]


def first_choices(shape: SkinnyShape, rows: int, machine: Machine, count: int, known: Iterable[Choice]) -> list[Choice]:
    """cuBLAS, those of ``known`` that can run, and the best by the model of the machine, each once."""
    others = [one for one in known if one is not None and fits(one, shape, rows, machine)]
    by_model = ranked(shape, rows, machine, count // 2 if shape.lines > BROAD_LINES else count)
    return list(dict.fromkeys([None, *others, *by_model]))


def variants(config: SkinnyConfig, shape: SkinnyShape, rows: int, machine: Machine) -> list[Choice]:
    """The same tile with more or less on the way: an early start or none, other prefetches, stages, splits."""
    found: list[SkinnyConfig] = []
    if machine.hopper:
        found += [replace(config, prefetch=size // config.block_n) for size in PREFETCHED]
        found.append(replace(config, early=not config.early))
    found += [replace(config, stages=config.stages + more) for more in (1, -1) if config.stages + more > 1]
    found += [replace(config, splits=config.splits + more) for more in (1, -1) if config.splits + more > 0]
    return [one for one in dict.fromkeys(found) if one != config and fits(one, shape, rows, machine)]


def fits(config: SkinnyConfig, shape: SkinnyShape, rows: int, machine: Machine) -> bool:
    return predicted_us(config, shape, rows, machine) < float("inf")


def table_of(assignment: Assignment, rows: int) -> Table:
    """A table that knows nothing else."""
    return Table(
        {
            shape.key(): {str(rows): None if choice is None else fields_of(choice)}
            for shape, choice in assignment.items()
        }
    )


def in_turns(lists: Iterable[list[tuple[SkinnyShape, Choice]]]) -> list[tuple[SkinnyShape, Choice]]:
    """The first of each list, then the second of each."""
    remaining = [list(one) for one in lists]
    found = []
    while any(remaining):
        found += [one.pop(0) for one in remaining if one]
    return found


def describe(choice: Choice) -> str:
    if choice is None:
        return "cublas"
    kind = "wide" if choice.parts == 0 else f"p{choice.parts}"
    return (
        f"{choice.block_n}x{choice.block_k} {kind} s{choice.splits} w{choice.warps} st{choice.stages}"
        f" pf{choice.prefetch * choice.block_n >> 10}k{' early' if choice.early else ''}"
    )
