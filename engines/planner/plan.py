"""Lifetimes to offsets in one buffer: greedy by size (Pisarchyk and Lee 2020, arXiv 2001.03288, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from engines.planner.lifetimes import VIEWS, Graph, Storage, storages

ALIGNMENT = 64
"""Bytes; a cache line, and the widest vector register."""


class PlanError(Exception):
    """A plan that would overwrite what is still needed."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """One buffer for all that a graph computes. Sizes in bytes."""

    storages: tuple[Storage, ...]
    offsets: tuple[int, ...]
    """Of each storage."""
    peak: int
    """Size of the buffer."""
    unshared: int
    """What all tensors take when each has its own memory, as long as the graph runs."""
    floor: int
    """The most bytes that live at any one step: no plan of these storages is smaller."""


def plan_memory(graph: Graph) -> MemoryPlan:
    """Plan the graph's own tensors, its outputs among them; inputs and weights belong to the caller.

    Raises PlanError if the plan fails its own replay, which would be a defect of this module.
    """
    found = storages(graph)
    offsets = assign_offsets(found)
    plan = MemoryPlan(
        storages=tuple(found),
        offsets=tuple(offsets),
        peak=max((offset + _padded(each.nbytes) for each, offset in zip(found, offsets, strict=True)), default=0),
        unshared=sum(_padded(graph.sizes[name]) for step in graph.steps for name in step.outputs),
        floor=max(live_bytes(found)),
    )
    replay(graph, plan)
    return plan


def assign_offsets(found: Sequence[Storage]) -> list[int]:
    """Largest first, each into the tightest gap between those placed already that live at the same time."""
    offsets: dict[int, int] = {}
    order = sorted(range(len(found)), key=lambda at: (-found[at].nbytes, found[at].first))
    for at in order:
        storage = found[at]
        taken = sorted(
            (offset, offset + _padded(found[other].nbytes))
            for other, offset in offsets.items()
            if found[other].first <= storage.last and storage.first <= found[other].last
        )
        offsets[at] = _tightest_gap(taken, _padded(storage.nbytes))
    return [offsets[at] for at in range(len(found))]


def live_bytes(found: Sequence[Storage]) -> list[int]:
    """Bytes that live at each step, and after the last one. At least one entry."""
    changes = np.zeros(max((storage.last for storage in found), default=0) + 2, np.int64)
    for storage in found:
        changes[storage.first] += _padded(storage.nbytes)
        changes[storage.last + 1] -= _padded(storage.nbytes)
    return list(map(int, changes.cumsum()[:-1]))


def replay(graph: Graph, plan: MemoryPlan) -> None:
    """Run the plan with names for contents: each tensor must be whole whenever a step, or the caller, reads it.

    Lifetimes are not looked at, so a mistake in them shows too. Raises PlanError that names the tensor.
    """
    place = {
        name: (offset // ALIGNMENT, storage)
        for storage, offset in zip(plan.storages, plan.offsets, strict=True)
        for name in storage.tensors
    }
    content = np.full(plan.peak // ALIGNMENT, -1, np.int64)
    written: dict[str, int] = {}
    stamps = count()

    def units(name: str) -> slice:
        start = place[name][0]
        return slice(start, start + _padded(graph.sizes[name]) // ALIGNMENT)

    def check(name: str, at: int) -> None:
        if name in written and not (content[units(name)] == written[name]).all():
            raise PlanError(f"step {at} reads {name} after its bytes were overwritten")

    for at, step in enumerate(graph.steps):
        for name in step.inputs:
            check(name, at)
        for name in (name for name in step.outputs if name in place):
            source = step.inputs[0] if step.op in VIEWS else ""
            if source in written and place[name] == place[source]:
                written[name] = written[source]
            else:
                content[units(name)] = written[name] = next(stamps)
        for name in step.outputs:
            check(name, at)
    for name in graph.outputs & written.keys():
        check(name, len(graph.steps))


def _tightest_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """Offset of the smallest gap that fits, or the end; ``taken`` is sorted by start."""
    best, best_size, end = -1, 0, 0
    for start, stop in taken:
        gap = start - end
        if gap >= size and (best < 0 or gap < best_size):
            best, best_size = end, gap
        end = max(end, stop)
    return best if best >= 0 else end


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
