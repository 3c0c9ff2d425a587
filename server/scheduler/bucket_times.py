"""How long steps of one-shot items take: for each shape bucket, a time each step and one each row.

An engine that is compiled for some row counts fills a step up to the next of them, and blank rows take as long as
others do. So rows count as padded: up to the next size, more of them cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from engines.protocol import StepSample
from server.scheduler.least_squares import LeastSquares
from server.scheduler.outliers import Ignored, Outliers
from server.scheduler.prediction_errors import PredictionErrors

WARM = 3
"""Steps of a bucket before a prediction is worth anything."""


class BucketTimes:
    """Steps of one bucket: seeded by a profile, then learned from settled steps."""

    def __init__(self, sizes: Sequence[int], errors: PredictionErrors) -> None:
        """``sizes`` are ``Capacity.one_shot_rows``; ``errors`` of all buckets of an engine are kept together."""
        self._sizes = sizes
        self._errors = errors
        self._fit = LeastSquares(2)
        self._outliers = Outliers()
        self._steps = 0

    def seed(self, samples: Sequence[StepSample]) -> None:
        """Start from steps that the engine measured at load; coefficients stay within 0.2 to 5 times of these."""
        for sample in samples:
            self._fit.observe((1.0, float(sample.rows)), sample.seconds)
        if samples:
            self._steps = WARM
            self._fit.bound()

    def observe(self, rows: int, seconds: float) -> Ignored:
        """Learn from one settled step of ``rows`` rows, without the blank ones, or say why not."""
        expected = self.seconds(rows)
        ignored = self._outliers.judge(seconds, expected)
        if ignored:
            return ignored
        if self._outliers.changed:
            self._fit.forget()
        if expected:
            self._errors.add(expected, seconds)
        self._fit.observe((1.0, float(self.padded(rows))), seconds)
        self._steps += 1
        return ""

    def padded(self, rows: int) -> int:
        """Rows of a step with the blank ones."""
        return next((size for size in self._sizes if size >= rows), rows)

    def seconds(self, rows: int) -> float:
        """Predicted time of a step; 0 where too little is known."""
        if self._steps < WARM:
            return 0.0
        each, per_row = self._fit.weights
        return each + per_row * self.padded(rows)

    @property
    def per_row(self) -> float:
        """What one more row costs, padding apart; 0 where too little is known."""
        return self._fit.weights[1] if self._steps >= WARM else 0.0
