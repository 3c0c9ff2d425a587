"""How far predicted step times were off of late."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

MEMORY = 256
"""Steps that are remembered."""
SAFETY = (1.02, 1.5)
"""Bounds of the factor that makes a prediction safe."""


class PredictionErrors:
    """The last ratios of actual to predicted time, and their quantiles."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, predicted: float, actual: float) -> None:
        if len(self._ratios) == MEMORY:
            del self._sorted[bisect_left(self._sorted, self._ratios.popleft())]
        ratio = actual / max(predicted, 1e-9)
        self._ratios.append(ratio)
        insort(self._sorted, ratio)

    @property
    def safety(self) -> float:
        """Running 90th percentile of actual over predicted time, bounded by ``SAFETY``."""
        least, most = SAFETY
        count = len(self._sorted)
        return min(max(self._sorted[int(0.9 * count)], least), most) if count else least

    @property
    def bias(self) -> float:
        """Running median of actual over predicted time, at least 1: what many steps together are off."""
        count = len(self._sorted)
        return min(max(self._sorted[count // 2], 1.0), SAFETY[1]) if count else 1.0

    def quantiles(self) -> tuple[float, float]:
        """Median and 95th percentile of the relative error; 0 before there are any."""
        errors = sorted(abs(ratio - 1) for ratio in self._ratios)
        return (errors[len(errors) // 2], errors[int(0.95 * (len(errors) - 1))]) if errors else (0.0, 0.0)
