"""When requests arrive: Poisson processes whose rate is constant, jumps between two states, steps or rises."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Literal

Process = Literal["poisson", "bursts", "steps", "ramp"]

BURST, CALM = 1.9, 0.55
"""Rates in the two states, relative to the mean."""
BURST_SECONDS, CALM_SECONDS = 3.0, 6.0
"""Mean time in each state: the mean rate is 1."""
STEP_LOW, STEP_HIGH, STEP_SECONDS = 0.5, 1.5, 10.0
RAMP_FROM, RAMP_TO = 0.2, 1.8


def arrivals(process: Process, rate: float, seconds: float, randomness: random.Random) -> list[float]:
    """Times from 0 to ``seconds``, ``rate`` a second on average; which are a Poisson process thinned to each moment."""
    factor, most = _rates(process, seconds, randomness)
    times, now = [], 0.0
    while (now := now + randomness.expovariate(rate * most)) < seconds:
        if randomness.random() * most < factor(now):
            times.append(now)
    return times


def _rates(process: Process, seconds: float, randomness: random.Random) -> tuple[Callable[[float], float], float]:
    """The rate at a time, relative to the mean and asked for in rising order, and the highest that occurs."""
    if process == "bursts":
        return _two_states(randomness), BURST
    if process == "steps":
        return lambda now: STEP_LOW if now // STEP_SECONDS % 2 == 0 else STEP_HIGH, STEP_HIGH
    if process == "ramp":
        return lambda now: RAMP_FROM + (RAMP_TO - RAMP_FROM) * now / seconds, RAMP_TO
    return lambda now: 1.0, 1.0


def _two_states(randomness: random.Random) -> Callable[[float], float]:
    changes = _changes(randomness)
    until, rate = next(changes)

    def factor(now: float) -> float:
        nonlocal until, rate
        while now >= until:
            until, rate = next(changes)
        return rate

    return factor


def _changes(randomness: random.Random) -> Iterator[tuple[float, float]]:
    """(end, rate) of one state after the other; it begins in either, as often as it is in it."""
    now = 0.0
    bursting = randomness.random() < BURST_SECONDS / (BURST_SECONDS + CALM_SECONDS)
    while True:
        now += randomness.expovariate(1 / (BURST_SECONDS if bursting else CALM_SECONDS))
        yield now, BURST if bursting else CALM
        bursting = not bursting
