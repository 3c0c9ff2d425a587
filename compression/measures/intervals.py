"""Confidence intervals: bootstrap over windows or prompts, Wilson's for shares of few trials."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_NORMAL_QUANTILE = 1.959963984540054
"""Of (1 + LEVEL) / 2."""

Values = Sequence[float] | np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class Estimate(msgspec.Struct, frozen=True):
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def ratio_of_sums(
    numerators: Values, denominators: Values, transform: Callable[[float], float] = lambda value: value
) -> Estimate:
    """``transform(sum(numerators) / sum(denominators))`` over units that were drawn independently, such as windows.

    Percentile bootstrap: whole units are drawn with replacement, so what hangs together inside a unit stays together.
    Both models' values of a unit belong into one numerator where they are compared: the comparison is then paired.
    ``transform`` must rise. Raises ValueError without units.
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    units = len(top)
    if not units or not bottom.sum():
        raise ValueError("an interval needs at least one unit")
    picks = np.random.default_rng(0).integers(units, size=(RESAMPLES, units))
    ratios = top[picks].sum(1) / np.maximum(bottom[picks].sum(1), np.finfo(np.float64).tiny)
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Estimate(transform(float(top.sum() / bottom.sum())), transform(low), transform(high))


def ratio_if_any(numerators: Values, denominators: Values) -> Estimate | None:
    """As ``ratio_of_sums``; None where there is nothing to take a ratio of."""
    return ratio_of_sums(numerators, denominators) if np.sum(np.asarray(denominators)) else None


def share(successes: int, trials: int) -> Estimate:
    """Wilson's score interval (Wilson 1927), which holds for few trials and for shares of 0 and 1."""
    if trials < 1:
        raise ValueError("a share needs at least one trial")
    rate, square = successes / trials, _NORMAL_QUANTILE**2
    centre = (rate + square / (2 * trials)) / (1 + square / trials)
    half = _NORMAL_QUANTILE * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials**2)) / (1 + square / trials)
    return Estimate(rate, max(0.0, min(centre - half, rate)), min(1.0, max(centre + half, rate)))
