"""How far a long run is, and how long it still takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """``done`` of ``total`` in units of equal work."""

    what: str
    done: float
    total: float
    """0: not known."""
    seconds_left: float | None
    """None before anything is done."""


Report = Callable[[Progress], None]
PartReport = Callable[[str, int, int], None]
"""What is done now, how much of it, and all of it (0: not known)."""


class Estimate:
    """Reports progress with the time left, at the speed so far."""

    def __init__(self, report: Report, clock: Callable[[], float], total: float, done: float = 0) -> None:
        """``done``: what an earlier run did; it says nothing about this one's speed."""
        self._report = report
        self._clock = clock
        self._total = total
        self._done = self._before = done
        self._started = clock()
        self._what = ""

    def begin(self, what: str) -> None:
        """What comes now, for people."""
        self._what = what
        self._send()

    def advance(self, amount: float = 1) -> None:
        self._done = min(self._done + amount, self._total)
        self._send()

    def reach(self, done: float) -> None:
        """So much is done in all."""
        self._done = min(max(self._done, done), self._total)
        self._send()

    def _send(self) -> None:
        new = self._done - self._before
        left = None if new <= 0 else (self._clock() - self._started) / new * (self._total - self._done)
        self._report(Progress(self._what, self._done, self._total, left))


class Parts:
    """A ``PartReport``: reports work that has several parts one after the other, each with the time that it still
    takes itself, since what one part took says nothing about the next."""

    def __init__(self, report: Report, clock: Callable[[], float]) -> None:
        self._report = report
        self._clock = clock
        self._what: str | None = None
        self._estimate: Estimate | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._estimate is None or what != self._what:
            self._what, self._estimate = what, Estimate(self._report, self._clock, total, done)
            self._estimate.begin(what)
        else:
            self._estimate.reach(done)
