"""A small online model of how long a step takes, learned from the device time of settled steps.

A step costs what its work costs, but never less than a floor: the weights are read once and the kernels are enqueued
one by one however few tokens there are. Up to that knee, more tokens cost nothing:

    seconds = max(floor + floor_row * rows, base + token * tokens + row * rows + decode_pair * ... + prompt_pair * ...
                                            + prompt_base + prompt_start * ...)

The last two are for steps with prompts: kernels of another kind, which go through the longest context of a row with
few queries one key after the other, while most of the device waits.

Both branches are linear, and each is fitted by recursive least squares on the relative error. Which branch a step lies
on is the larger one's business; where the knee is unknown yet or moved, a few kept samples of every size are fitted
with the knee at each of them in turn.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from engines.protocol import StepSample
from server.scheduler.items import StepWork
from server.scheduler.least_squares import LeastSquares
from server.scheduler.outliers import Ignored, Outliers
from server.scheduler.prediction_errors import PredictionErrors

# Features are scaled so that their coefficients are of one size: seconds for 64 tokens or rows, a million pairs or
# 8,192 earlier tokens. That there are prompts at all counts as one row does.
UNIT = 1.0 / 64
PAIRS = 1.0 / (1 << 20)
CONTEXT = 1.0 / (1 << 13)
WARM = 3
"""Observations before a prediction is worth anything ..."""
SURE = 32
"""... and before anything is refused because of one."""
KEPT = 5
"""Samples kept of each size; sizes are powers of two of tokens."""
ROUNDS = 3
"""A long context lifts even a small step off the floor, so samples are assigned again by what was fitted."""
EARNED = 1.25
"""How much worse the fit without a floor, or with the floor of now, must be before another one is taken."""
FLOOR_REACH = 2
"""The floor is taken to rise up to so many times the most rows that were seen on it. A slope that was learned from few
rows is mostly noise, and says nothing of a hundred."""
FIRST_SEARCH = 16
"""Observations before the knee is looked for; again at each doubling."""


def attended_pairs(start: int, count: int) -> float:
    """Query-key pairs of a row that computes ``count`` tokens after ``start`` earlier ones."""
    return count * (start + (count + 1) / 2)


def add_row(work: StepWork, start: int, count: int) -> None:
    """Count one more row of a sequence, all but its prompt tokens."""
    work.rows += 1
    work.tokens += count
    if count == 1:
        work.decode_pairs += start + 1
    else:
        work.prompt_pairs += attended_pairs(start, count)
        if start > work.prompt_start:
            work.prompt_start = start


class StepTimeModel:
    """Predicts steps, says how far predictions can be trusted, and inverts them into token counts."""

    def __init__(self) -> None:
        self._machine = _Machine()
        self._observations = 0
        self._outliers = Outliers()
        self._largest = 0
        self.errors = PredictionErrors()
        self._kept: dict[int, deque[tuple[StepWork, float]]] = {}
        self._search: _KneeSearch | None = None
        self._next_search = FIRST_SEARCH

    @property
    def warm(self) -> bool:
        return self._observations >= WARM

    @property
    def sure(self) -> bool:
        return self._observations >= SURE

    @property
    def largest(self) -> int:
        """Most tokens of a step that was observed."""
        return self._largest

    @property
    def overhead(self) -> float:
        """Seconds that each step costs beside its work."""
        return self._machine.base

    @property
    def safety(self) -> float:
        """Factor that makes a prediction safe."""
        return self.errors.safety

    @property
    def bias(self) -> float:
        """Factor that makes a prediction of many steps right."""
        return self.errors.bias

    def seed(self, samples: Sequence[StepSample]) -> None:
        """Start from steps that the engine measured at load; coefficients stay within 0.2 to 5 times of these."""
        for sample in samples:
            work = StepWork(
                rows=sample.rows,
                tokens=sample.tokens,
                decode_pairs=sample.decode_pairs,
                prompt_pairs=sample.prompt_pairs,
                prompt_start=sample.prompt_start,
            )
            self._keep(work, sample.seconds)
            self._largest = max(self._largest, sample.tokens)
        if samples:
            self._observations = SURE
            search = _KneeSearch(list(self._samples()))
            while not search.done:
                search.step()
            self._machine = search.best
            self._machine.bound()

    def predict(self, work: StepWork) -> float:
        """Seconds that a step of this size takes."""
        return self._machine.predict(work)

    def added(self, tokens: int, pairs: float) -> float:
        """Seconds that prompt tokens add to steps that have left the floor already."""
        machine = self._machine
        return machine.token * tokens + machine.prompt_pair * pairs

    def tokens_within(self, work: StepWork, start: int, seconds: float) -> int:
        """Most tokens of one more row, after ``start`` earlier ones, with which the step takes at most ``seconds``.

        Tokens that cost nothing because the step lies on the floor are granted whatever ``seconds`` says.
        """
        machine = self._machine
        prompts = machine.prompts_of(True, max(start, work.prompt_start))
        prompts -= machine.prompts_of(work.prompt_pairs > 0, work.prompt_start)
        room = max(seconds, machine.floor_of(work.rows + 1)) - machine.work_of(work) - machine.row - prompts
        if room <= 0:
            return 0
        # Solve prompt_pair/2 * n^2 + linear * n = room, in the form that also holds for prompt_pair = 0.
        linear = machine.token + machine.prompt_pair * (start + 0.5)
        divisor = linear + math.sqrt(linear * linear + 2 * machine.prompt_pair * room)
        most = 2 * room / divisor if divisor > 0 else math.inf
        return int(min(most, 1 << 30))

    def observe(self, work: StepWork, seconds: float) -> Ignored:
        """Learn from one settled step, or say why not: what cannot be a measurement is ignored."""
        expected = self.predict(work) if self.warm else 0.0
        ignored = self._outliers.judge(seconds, expected)
        if ignored:
            return ignored
        if self._outliers.changed:
            self._kept.clear()
            self._next_search = self._observations + FIRST_SEARCH
            self._machine.forget()
        if self.warm:
            self.errors.add(expected, seconds)
        self._observations += 1
        self._largest = max(self._largest, work.tokens)
        self._keep(work, seconds)
        self._machine.observe(work, seconds)
        self._look_for_the_knee()
        return ""

    def _keep(self, work: StepWork, seconds: float) -> None:
        self._kept.setdefault(work.tokens.bit_length(), deque(maxlen=KEPT)).append((work, seconds))

    def _samples(self) -> Sequence[tuple[StepWork, float]]:
        return [sample for size in sorted(self._kept) for sample in self._kept[size]]

    def _look_for_the_knee(self) -> None:
        """One candidate a call, so that no settle takes long."""
        if self._search is None:
            if self._observations < self._next_search:
                return
            self._next_search = 2 * self._observations
            self._search = _KneeSearch(list(self._samples()))
        self._search.step()
        if self._search.done:
            if EARNED * self._search.best_error < self._search.error_of(self._machine):
                self._search.best.bounds_from(self._machine)
                self._machine = self._search.best
            self._search = None


class _Machine:
    """The two branches. Coefficients are plain floats, refreshed after each observation."""

    def __init__(self) -> None:
        self._floor = LeastSquares(2)
        self._work = LeastSquares(7)
        self._floor_rows = 0  # most that were seen on it
        self._refresh()

    def _refresh(self) -> None:
        floor, floor_row = self._floor.weights
        base, token, row, decode_pair, prompt_pair, prompt_base, prompt_start = self._work.weights
        self.floor, self.floor_row = floor, floor_row * UNIT
        self.base, self.token, self.row = base, token * UNIT, row * UNIT
        self.decode_pair, self.prompt_pair = decode_pair * PAIRS, prompt_pair * PAIRS
        self.prompt_base, self.prompt_start = prompt_base * UNIT, prompt_start * CONTEXT

    def floor_of(self, rows: int) -> float:
        return self.floor + self.floor_row * min(rows, FLOOR_REACH * self._floor_rows)

    def work_of(self, work: StepWork) -> float:
        return (
            self.base
            + self.token * (work.tokens + work.padding)
            + self.row * work.rows
            + self.decode_pair * work.decode_pairs
            + self.prompt_pair * work.prompt_pairs
            + self.prompts_of(work.prompt_pairs > 0, work.prompt_start)
        )

    def prompts_of(self, any_prompt: bool, start: int) -> float:
        """What a step with prompts costs beside its tokens and pairs."""
        return self.prompt_base + self.prompt_start * start if any_prompt else 0.0

    def predict(self, work: StepWork) -> float:
        return max(self.floor_of(work.rows), self.work_of(work))

    def on_floor(self, work: StepWork) -> bool:
        return self.floor_of(work.rows) > self.work_of(work)

    def observe(self, work: StepWork, seconds: float, on_floor: bool | None = None) -> None:
        if self.on_floor(work) if on_floor is None else on_floor:
            self._floor.observe((1.0, work.rows * UNIT), seconds)
            self._floor_rows = max(self._floor_rows, work.rows)
        else:
            pairs = work.decode_pairs * PAIRS, work.prompt_pairs * PAIRS
            tokens = work.tokens + work.padding
            prompts = (UNIT if work.prompt_pairs else 0.0), work.prompt_start * CONTEXT
            self._work.observe((1.0, tokens * UNIT, work.rows * UNIT, *pairs, *prompts), seconds)
        self._refresh()

    def bound(self) -> None:
        """Keep every coefficient near what it is now."""
        self._floor.bound()
        self._work.bound()

    def bounds_from(self, other: _Machine) -> None:
        self._floor.bounds_from(other._floor)
        self._work.bounds_from(other._work)
        self._refresh()

    def forget(self) -> None:
        """The machine has changed: what comes next counts for more than all that was."""
        self._floor.forget()
        self._work.forget()


class _KneeSearch:
    """Fits the samples with the steps up to each size on the floor, and none at first, and keeps the best fit."""

    def __init__(self, samples: Sequence[tuple[StepWork, float]]) -> None:
        self._samples = samples
        sizes = sorted({work.tokens.bit_length() for work, _ in samples})
        self._cuts = deque([0, *((1 << size) - 1 for size in sizes[:-1])])
        self.best = _Machine()
        self.best_error = math.inf

    @property
    def done(self) -> bool:
        return not self._cuts

    def step(self) -> None:
        cut = self._cuts.popleft()
        on_floor = [work.tokens <= cut for work, _ in self._samples]
        for _ in range(ROUNDS):
            machine = _Machine()
            for (work, seconds), low in zip(self._samples, on_floor, strict=True):
                machine.observe(work, seconds, low)
            # A floor must earn its place: the simpler machine wins within the noise.
            error = self.error_of(machine) * (EARNED if cut else 1.0)
            if error < self.best_error:
                self.best, self.best_error = machine, error
            moved = [machine.on_floor(work) for work, _ in self._samples]
            if moved == on_floor:
                break
            on_floor = moved

    def error_of(self, machine: _Machine) -> float:
        """Mean square of the relative error."""
        errors = [(machine.predict(work) / seconds - 1) ** 2 for work, seconds in self._samples]
        return sum(errors) / len(errors)
