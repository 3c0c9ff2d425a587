"""What is left of one step while a plan is being made."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Literal

from server.scheduler.items import StepWork
from server.scheduler.step_time import StepTimeModel, add_row, attended_pairs

MIN_CHUNK = 32
"""Prompt tokens that every step may compute whatever the targets of decodes say, so that no prompt starves."""
SOFT_CHUNK = 256
"""The same where nobody asked for the targets: throughput comes first."""
COLD_CHUNK = 256
"""Most prompt tokens of a step with a latency bound, before the model has seen steps to predict from."""
TRUST = 4
"""A prediction is trusted for steps up to so many times the largest that was seen."""
PUT_OFF = 0.5
"""A first token may come later by this share of a step of decodes where all streams get a token more meanwhile."""

Bound = Literal["", "tokens", "trust", "time", "padding"]
"""What keeps prompt tokens out of a step: its size, predictions that reach no further, what it may take, or a captured
graph that they would fill in part only."""


class StepBudget:
    """Tokens and predicted seconds of one step. Decodes are paid for first and are never held back."""

    def __init__(
        self,
        work: StepWork,
        tokens: int,
        seconds: float,
        floor: int,
        model: StepTimeModel,
        graphs: Sequence[int] = (),
    ) -> None:
        """``work`` is the step's decodes and ``tokens`` what they leave.

        ``seconds``, perhaps infinite, are for the whole step; ``floor`` prompt tokens are granted whatever they say.
        A step of no more tokens than the last of ``graphs`` takes what the next larger one of them takes, so where
        time is short it is made no larger than the next smaller one.
        """
        self.work = work
        self.tokens = tokens
        self.cut: Bound = ""
        """Why a row was last granted less than it wanted."""
        self._size: Bound = "tokens"
        self._seconds = seconds
        self._graphs = graphs
        self._model = model
        self._floor = min(floor, tokens)
        if seconds < math.inf:
            trusted = TRUST * model.largest if model.warm else 0
            self.tokens = min(tokens, max(COLD_CHUNK, trusted))
            self._size = "tokens" if self.tokens == tokens else "trust"
            if not model.warm:
                self._seconds = math.inf

    @property
    def open(self) -> bool:
        """``take`` would grant something."""
        return self.tokens > 0 and (self._floor > 0 or self._fit(0) > 0)

    @property
    def closed_by(self) -> Bound:
        """Why ``take`` would grant nothing."""
        return "time" if self.tokens else self._size

    def limit(self) -> int:
        """Tokens that a new prompt alone could take now."""
        return self._fit(0)

    def take(self, start: int, wanted: int) -> int:
        """Grant a row up to ``wanted`` tokens after its first ``start``, at least one while open, and count them."""
        if not self.open:
            return 0
        fit = self._fit(start)
        count = min(wanted, max(1, fit))
        if count < wanted:
            self.cut = "time" if fit < self.tokens else self._size
        self.tokens -= count
        self._floor = max(0, self._floor - count)
        add_row(self.work, start, count)
        return count

    def end_by(self, seconds: float) -> None:
        """Somebody needs the step to take no longer than this, if what is in it allows that."""
        if self._model.predict(self.work) <= seconds:
            self._seconds = min(self._seconds, seconds)

    def fill_graph(self, wanted: int) -> None:
        """Leave to the next step what of ``wanted`` prompt tokens would fill a captured graph in part only.

        The step then takes what the largest graph that they do fill takes, and its streams, and prompts that it
        completes, have their tokens sooner. The last prompt waits for the next step, and hardly longer than it would
        have waited for one that is padded up: otherwise nothing is left out.
        """
        decodes, graphs = self.work.tokens, self._graphs
        tokens = decodes + min(wanted, self.tokens)
        index = bisect_left(graphs, tokens)
        if not 0 < index < len(graphs) or graphs[index - 1] <= decodes:
            return
        filled, padded = graphs[index - 1], graphs[index]
        rest = graphs[bisect_left(graphs, decodes + tokens - filled)]
        later = self._seconds_of(filled) + self._seconds_of(rest) - self._seconds_of(padded)
        if later <= PUT_OFF * self._seconds_of(decodes):
            self.tokens = filled - decodes
            self._size = "padding"

    def _seconds_of(self, tokens: int) -> float:
        """Of a step of so many tokens, these decodes among them."""
        work, prompt = self.work, tokens - self.work.tokens
        pairs = attended_pairs(0, prompt)
        return self._model.predict(StepWork(work.rows, tokens, decode_pairs=work.decode_pairs, prompt_pairs=pairs))

    def _fit(self, start: int) -> int:
        if self._seconds == math.inf:
            return self.tokens
        fit = self._model.tokens_within(self.work, start, self._seconds)
        return min(self.tokens, max(self._floor, self._filling(fit)))

    def _filling(self, fit: int) -> int:
        """``fit`` tokens more, or as many as just fill a graph."""
        taken = self.work.tokens
        if not self._graphs or taken + fit > self._graphs[-1]:
            return fit
        index = bisect_right(self._graphs, taken + fit)
        return max(0, self._graphs[index - 1] - taken) if index else 0
