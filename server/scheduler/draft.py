"""A plan in the making, and what is counted meanwhile."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from operator import attrgetter

from engines.protocol import Admit, Capacity, Row, StepPlan
from server.scheduler.budget import StepBudget
from server.scheduler.items import SequenceState, StepWork
from server.scheduler.survey import Survey


@dataclass(slots=True)
class Tally:
    """Counters of one engine's sequences since the worker started."""

    decisions: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    computed: int = 0
    recomputed: int = 0


class Draft:
    """The parts of a plan in the making."""

    def __init__(self, survey: Survey, budget: StepBudget, now: float) -> None:
        self.survey = survey
        self.budget = budget
        self.now = now
        self.decodes: list[Row] = []
        self.chunks: list[Row] = []
        self.admits: list[Admit] = []
        self.planned: list[SequenceState] = []
        self.work = StepWork()
        self._graph_rows = self._graph_tokens = 0

    def choose_graph(self, capacity: Capacity) -> None:
        """The smallest that holds all rows, if any does. What is then computed beside them is work, too."""
        sizes = capacity.graph_tokens if self.chunks else capacity.graph_rows
        size = next((size for size in sizes if size >= self.work.tokens), 0)
        self.work.padding = max(0, size - self.work.tokens)
        if self.chunks:
            self._graph_tokens = size
        else:
            self._graph_rows = size

    def plan(self, step: int, name: str) -> StepPlan:
        return StepPlan(
            step=step,
            engine=name,
            admits=tuple(self.admits),
            # Longest first: attention of many rows starts their programs in this order, and a long one that starts last
            # would run alone.
            rows=(*sorted(self.decodes, key=attrgetter("start"), reverse=True), *self.chunks),
            graph_rows=self._graph_rows,
            graph_tokens=self._graph_tokens,
        )
