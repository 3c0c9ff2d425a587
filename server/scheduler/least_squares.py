"""Recursive least squares of the relative error, with coefficients kept in bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence

NOISE = 0.05
"""Relative error of one measurement."""
DRIFT = 0.01
"""How far all coefficients together may drift in one observation, relative to themselves: a clock that changes ..."""
OWN_DRIFT = 0.002
"""... and each of them alone. Small, because steps that are all alike tell nothing about it."""
SPREAD = 1.0
"""Variance of an unknown constant, in square seconds ..."""
SLOPE_SPREAD = 0.02
"""... and of any other coefficient: of two explanations the one that a step costs what it costs is the better guess."""
REACH = (0.2, 5.0)
"""Bounds of a coefficient, relative to the one it was seeded with."""


class LeastSquares:
    """seconds = weights . features, with weights that are never negative: more work never takes less time.

    The first feature must be the constant 1.

    Coefficients drift as a random walk with bounded variance, so what the present load does not show (the cost of a
    prefill token while there are only decodes) is kept and not forgotten.
    """

    def __init__(self, size: int) -> None:
        self.weights = [0.0] * size
        """Within bounds. What the observations alone say is kept apart, or every correction would be taken for one."""
        self._estimate = [0.0] * size
        self._variance = [[_spread(i) if i == j else 0.0 for j in range(size)] for i in range(size)]
        self._bounds = [(0.0, math.inf)] * size

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """``seconds`` must be positive and finite."""
        scaled = [feature / seconds for feature in features]
        size = range(len(scaled))
        estimate, variance = self._estimate, self._variance
        gain = [sum(row[j] * scaled[j] for j in size) for row in variance]
        total = NOISE * NOISE + sum(scaled[i] * gain[i] for i in size)
        error = (1.0 - sum(scaled[i] * estimate[i] for i in size)) / total
        for i in size:
            estimate[i] += gain[i] * error
            row, share = variance[i], gain[i] / total
            for j in size:
                row[j] -= share * gain[j]
        self._restrain()
        drift = [DRIFT * weight for weight in self.weights]
        for i in size:
            row, own = variance[i], (OWN_DRIFT * self.weights[i]) ** 2
            for j in size:
                row[j] += drift[i] * drift[j]
            row[i] = min(row[i] + own, self._most_spread(i))

    def _restrain(self) -> None:
        """Move weights that left their bounds back, and the others as far as they go with them."""
        weights = list(self._estimate)
        for i, (least, most) in enumerate(self._bounds):
            variance = self._variance[i]
            nearest = min(max(weights[i], least), most)
            if nearest != weights[i] and variance[i] > 0:
                shift = (nearest - weights[i]) / variance[i]
                weights = [weight + variance[j] * shift for j, weight in enumerate(weights)]
        # What moved along may have left its own bounds; a second round is worth less than it costs.
        self.weights = [
            min(max(weight, least), most) for weight, (least, most) in zip(weights, self._bounds, strict=True)
        ]

    def _most_spread(self, index: int) -> float:
        return max(_spread(index), (REACH[1] * self.weights[index]) ** 2)

    def bound(self) -> None:
        """Keep each weight within ``REACH`` of what it is now; one that is 0 stays free."""
        least, most = REACH
        self._bounds = [(least * weight, most * weight) if weight else (0.0, math.inf) for weight in self.weights]

    def bounds_from(self, other: LeastSquares) -> None:
        """Take over the other's bounds, and move into them."""
        self._bounds = other._bounds
        self._restrain()

    def forget(self) -> None:
        """The weights stay, but nothing is known of them any more."""
        for i, row in enumerate(self._variance):
            row[i] = self._most_spread(i)
        self._bounds = [(0.0, math.inf)] * len(self.weights)


def _spread(index: int) -> float:
    return SLOPE_SPREAD if index else SPREAD
