"""How many CPU threads one operation should use, found by trying."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

HOPELESS = 2.0
"""A thread count this many times slower than the best so far ends the search: more threads will not help."""

ROUNDS = 3
MEASURABLE = 1e-9
"""Seconds; a clock may see less than this as no time at all."""

FIRST_PATIENCE, LAST_PATIENCE = 1.0, 60.0
"""Seconds between two tries of a thread count that has lost: doubled at each loss."""
DISTRESS = 1.6
"""Steps this many times slower than at the load, on average, are worth a look at fewer threads."""
MARGIN_UP, MARGIN_DOWN = 1.1, 1.3
"""How much faster more threads, or fewer, must be to take over. One slow step must not cost the better count."""
DEAREST_TRY = 0.3
"""Seconds that a step may be expected to take where it tries more threads, which may turn out many times slower."""
SMOOTHING = 0.3
"""Weight of the last step in the mean of the present thread count."""


def available_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: its affinity, bounded by the container's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, math.ceil(_quota(cgroup) or cores)))


def _quota(cgroup: Path) -> float | None:
    """Cores' worth of time that the cgroup may take, None where it is not limited."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return None
    if quota.strip() == "max" or int(quota) <= 0:
        return None
    return int(quota) / int(period)


def candidates(cores: int) -> list[int]:
    """Thread counts worth a try: powers of two up to the cores, and the cores."""
    return sorted({1 << power for power in range(cores.bit_length()) if 1 << power <= cores} | {cores})


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds that a step takes, roughly, as a line through two measured ones."""

    fixed: float
    per_token: float

    def seconds(self, tokens: int) -> float:
        return self.fixed + self.per_token * tokens


def choose_threads(
    cores: int, run: Callable[[int], object], small: int, large: int, clock: Callable[[], float]
) -> tuple[int, StepCost]:
    """The thread count that runs steps of ``small`` and ``large`` tokens fastest, set in this thread, and their cost.

    Each of the two counts by its ratio to the fastest run of the same size, so the short one weighs as much.
    Measuring matters: on a machine that is busy with other work, two threads can be many times slower than one,
    because each operation waits for the thread that is not running.
    """
    times: dict[int, tuple[float, float]] = {}
    lowest = (math.inf, math.inf)
    for threads in candidates(cores):
        torch.set_num_threads(threads)
        own = times[threads] = best_time(lambda: run(small), clock), best_time(lambda: run(large), clock)
        lowest = min(lowest[0], own[0]), min(lowest[1], own[1])
        if own[0] > HOPELESS * lowest[0] and own[1] > HOPELESS * lowest[1]:
            break
    chosen = min(times, key=lambda threads: sum(own / low for own, low in zip(times[threads], lowest, strict=True)))
    torch.set_num_threads(chosen)
    low, high = times[chosen]
    per_token = max(0.0, high - low) / max(1, large - small)
    return chosen, StepCost(max(low - per_token * small, MEASURABLE), per_token)


def best_time(step: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    step()
    times = []
    for _ in range(ROUNDS):
        started = clock()
        step()
        times.append(clock() - started)
    return max(min(times), MEASURABLE)


@dataclass(slots=True)
class _Level:
    """What is known of one thread count; times relative to ``StepCost``."""

    threads: int
    slowness: float = math.nan
    """Mean over the last steps; not a number before the first."""
    trusted_until: float = -math.inf
    patience: float = FIRST_PATIENCE


class ThreadGovernor:
    """Changes the thread count between steps when another one has become faster.

    A choice at load does not last: once other processes want the cores, an operation on several threads waits in
    each of its parts for one that is not running. So when steps have become slow, one runs with the next lower count;
    and a higher count than the present one is tried now and then, more and more seldom while that loses. On a quiet
    machine nothing changes: changing the count costs time by itself. What a step computes does not depend on it.

    Steps of about the same size have a count of their own: more threads that win nothing in a step of one token may
    halve one of thirty.
    """

    def __init__(self, cores: int, chosen: int, cost: StepCost, clock: Callable[[], float]) -> None:
        self._make = partial(_SizeGovernor, cores, chosen, cost, clock)
        self._by_size: dict[int, _SizeGovernor] = {}

    def prepare(self, tokens: int) -> None:
        """Set the thread count of a step of so many tokens, in the calling thread."""
        torch.set_num_threads(self._governor(tokens).prepare(tokens))

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn how long the prepared step took."""
        self._governor(tokens).observe(tokens, seconds)

    def _governor(self, tokens: int) -> _SizeGovernor:
        size = tokens.bit_length()
        if size not in self._by_size:
            self._by_size[size] = self._make()
        return self._by_size[size]


class _SizeGovernor:
    """The thread count of steps of about the same size."""

    def __init__(self, cores: int, chosen: int, cost: StepCost, clock: Callable[[], float]) -> None:
        self._levels = [_Level(threads) for threads in candidates(cores)]
        self._home = next(index for index, level in enumerate(self._levels) if level.threads == chosen)
        self._home_since = clock()
        self._at = self._home
        self._cost = cost
        self._clock = clock

    def prepare(self, tokens: int) -> int:
        """The thread count for a step of so many tokens."""
        now = self._clock()
        self._at = self._home
        for index in self._neighbours():
            if self._worth_a_try(index, tokens) and now >= self._levels[index].trusted_until:
                self._at = index
                break
        return self._levels[self._at].threads

    def _worth_a_try(self, index: int, tokens: int) -> bool:
        if math.isnan(self._levels[self._home].slowness):
            return False
        if index < self._home:
            return self._levels[self._home].slowness > DISTRESS
        return self._cost.seconds(tokens) <= DEAREST_TRY

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn how long the prepared step took."""
        now, level = self._clock(), self._levels[self._at]
        slowness = seconds / self._cost.seconds(tokens)
        if self._at == self._home:
            first = math.isnan(level.slowness)
            level.slowness = slowness if first else level.slowness + SMOOTHING * (slowness - level.slowness)
        else:
            level.slowness = slowness
            level.trusted_until = now + level.patience
            level.patience = min(2 * level.patience, LAST_PATIENCE)
        self._move(now)

    def _move(self, now: float) -> None:
        """Take over the better neighbour's count, where what is known of it is still trusted."""
        home = self._levels[self._home]
        trusted = [index for index in self._neighbours() if now < self._levels[index].trusted_until]
        best = min(trusted, key=lambda index: self._levels[index].slowness, default=self._home)
        margin = MARGIN_DOWN if best < self._home else MARGIN_UP
        if self._levels[best].slowness * margin >= home.slowness:
            return
        if now - self._home_since > home.patience:
            home.patience = FIRST_PATIENCE
        home.trusted_until = now + home.patience
        home.patience = min(2 * home.patience, LAST_PATIENCE)
        self._home, self._home_since = best, now

    def _neighbours(self) -> list[int]:
        return [index for index in (self._home - 1, self._home + 1) if 0 <= index < len(self._levels)]
