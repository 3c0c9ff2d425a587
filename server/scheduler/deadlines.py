"""How much one step may take: a bound on tokens, and one on predicted seconds that follows from the latency targets.

The law looks one step ahead and uses device time only. Latency that includes queueing never enters it: a rule that
shrinks the batch when requests wait makes them wait longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from server.scheduler.step_time import StepTimeModel, attended_pairs

MIN_CHUNK = 32
"""Prompt tokens that every step may compute whatever the targets say, so that no prompt starves."""
COLD_CHUNK = 256
"""Most prompt tokens of a step with a latency bound, before the model has seen steps to predict from."""
STEP_SHARE = 0.25
"""Share of the TTFT target that one step may take: a prompt may arrive behind two launched steps."""
STRETCH = 2.0
"""TPOT is a mean over a stream, so one step may take this many times the target where that saves a first token."""


@dataclass(frozen=True, slots=True)
class OldestPrompt:
    """The prompt with the earliest arrival that is not computed yet."""

    start: int
    remaining: int
    arrived: float


@dataclass(frozen=True, slots=True)
class Targets:
    """Wanted latencies in seconds; None is no target."""

    ttft: float | None
    tpot: float | None

    @property
    def bounded(self) -> bool:
        return self.ttft is not None or self.tpot is not None

    def step_seconds(
        self, *, decodes: int, base: float, prompt: OldestPrompt | None, now: float, model: StepTimeModel
    ) -> float:
        """Longest that the next step should take, ``math.inf`` where nothing bounds it.

        ``base`` is the predicted time of the step's decodes alone.
        """
        ceiling = math.inf if self.ttft is None else self.ttft * STEP_SHARE
        if self.tpot is None or not decodes:
            return ceiling
        limit = min(self.tpot, ceiling)
        if self.ttft is not None and prompt is not None:
            left = prompt.arrived + self.ttft - now
            chunk = max(model.tokens_within(prompt.start, limit - base), MIN_CHUNK)
            if 0 < left < math.ceil(prompt.remaining / chunk) * limit:
                limit = min(limit * STRETCH, ceiling)
        return limit


class StepBudget:
    """What is left of one step while a plan is being made. Decodes are paid for first and are never held back."""

    def __init__(self, tokens: int, seconds: float, model: StepTimeModel) -> None:
        """``tokens`` and ``seconds`` are what the step's decodes leave; ``seconds`` may be negative or infinite."""
        self.tokens = tokens
        self._seconds = seconds
        self._model = model
        self._floor = min(MIN_CHUNK, tokens)
        if seconds < math.inf and not model.warm:
            self.tokens = min(tokens, COLD_CHUNK)
            self._seconds = math.inf

    @property
    def open(self) -> bool:
        """``take`` would grant something."""
        return self.tokens > 0 and (self._floor > 0 or self._seconds > 0)

    def limit(self) -> int:
        """Tokens that a new prompt alone could take now."""
        return self._fit(0)

    def take(self, start: int, wanted: int) -> int:
        """Grant a row up to ``wanted`` tokens after its first ``start``, at least one while open, and count them."""
        count = min(wanted, self._fit(start))
        self.tokens -= count
        self._floor = max(0, self._floor - count)
        if self._seconds < math.inf:
            self._seconds -= self._model.predict(count, attended_pairs(start, count)) - self._model.predict(0, 0)
        return count

    def _fit(self, start: int) -> int:
        if not self.open:
            return 0
        if self._seconds == math.inf:
            return self.tokens
        return min(self.tokens, max(self._floor, self._model.tokens_within(start, self._seconds), 1))
