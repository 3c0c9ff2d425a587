"""A small online model of how long a step takes, learned from the device time of settled steps."""

from __future__ import annotations

import math

# Features are scaled so that their coefficients are of one size: seconds for 64 tokens, seconds for 64 Ki pairs.
TOKENS = 1.0 / 64
PAIRS = 1.0 / 65536
# Relative error of one measurement, and how far a coefficient may drift in one step, relative to itself.
NOISE = 0.05
DRIFT = 0.01
SPREAD = 1.0
"""Variance of an unknown coefficient, in square seconds."""
WARM = 3
"""Observations before a prediction is worth anything."""
ABSURD = 5.0
PATIENCE = 4
"""A step this many times off the prediction is ignored (a page fault storm, a suspended machine), but not so many in
a row: then the machine itself has changed."""


def attended_pairs(start: int, count: int) -> float:
    """Query-key pairs of a row that computes ``count`` tokens after ``start`` earlier ones."""
    return count * (start + (count + 1) / 2)


class StepTimeModel:
    """seconds = a + b * tokens + c * attended pairs, fitted by recursive least squares on the relative error.

    Coefficients drift as a random walk with bounded variance, so what the present load does not show (the cost of a
    prefill token while there are only decodes) is kept and not forgotten.
    """

    def __init__(self) -> None:
        self._weights = [0.0, 0.0, 0.0]
        self._variance = [[SPREAD if i == j else 0.0 for j in range(3)] for i in range(3)]
        self._observations = 0
        self._rejected = 0

    @property
    def warm(self) -> bool:
        return self._observations >= WARM

    def predict(self, tokens: int, pairs: float) -> float:
        """Seconds that a step of this size takes."""
        base, per_token, per_pair = self._costs()
        return base + per_token * tokens + per_pair * pairs

    def tokens_within(self, start: int, seconds: float) -> int:
        """Most tokens of one row, after ``start`` earlier ones, that make a step at most ``seconds`` longer."""
        if seconds <= 0:
            return 0
        _, per_token, per_pair = self._costs()
        # Solve per_pair/2 * n^2 + linear * n = seconds, in the form that also holds for per_pair = 0.
        linear = per_token + per_pair * (start + 0.5)
        divisor = linear + math.sqrt(linear * linear + 2 * per_pair * seconds)
        most = 2 * seconds / divisor if divisor > 0 else math.inf
        return int(min(most, 1 << 30))

    def observe(self, tokens: int, pairs: float, seconds: float) -> None:
        """Learn from one settled step. What cannot be a measurement is ignored."""
        if not (math.isfinite(seconds) and seconds > 0) or self._absurd(tokens, pairs, seconds):
            return
        self._observations += 1
        features = (1.0 / seconds, tokens * TOKENS / seconds, pairs * PAIRS / seconds)
        spread = self._variance
        gain = [sum(spread[i][j] * features[j] for j in range(3)) for i in range(3)]
        total = NOISE * NOISE + sum(features[i] * gain[i] for i in range(3))
        error = 1.0 - sum(features[i] * self._weights[i] for i in range(3))
        for i in range(3):
            self._weights[i] += gain[i] / total * error
            for j in range(3):
                spread[i][j] -= gain[i] * gain[j] / total
            spread[i][i] = min(spread[i][i] + (DRIFT * self._weights[i]) ** 2, SPREAD)

    def _absurd(self, tokens: int, pairs: float, seconds: float) -> bool:
        if not self.warm:
            return False
        expected = self.predict(tokens, pairs)
        if expected / ABSURD <= seconds <= expected * ABSURD:
            self._rejected = 0
            return False
        self._rejected += 1
        if self._rejected <= PATIENCE:
            return True
        self._rejected = 0
        for i in range(3):
            self._variance[i][i] = SPREAD
        return False

    def _costs(self) -> tuple[float, float, float]:
        """Seconds a step, a token and a pair. A negative coefficient is noise: more work never takes less time."""
        base, per_token, per_pair = (max(0.0, weight) for weight in self._weights)
        return base, per_token * TOKENS, per_pair * PAIRS
