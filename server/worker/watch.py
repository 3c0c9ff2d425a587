"""When a worker counts as stuck, and how long to wait before the next one is started. Pure: time comes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from server.worker.wire import LoadReport

SECOND_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds of back-off. The first restart after a settled step does not wait: streams do."""
START_PATIENCE = 60.0
"""Seconds that a process may say nothing while it starts or loads: importing large libraries stops all its threads."""


Cause = Literal["died", "silent", "no_step", "load_timeout", "broken"]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a worker process is at its end."""

    cause: Cause
    """Label of the counter of restarts. ``broken``: what it says or does makes no sense."""
    text: str
    """For the log."""


class Watchdog:
    """Deadlines of one incarnation, by what its reports say. Times in seconds."""

    def __init__(self, now: float, *, step_timeout: float, load_timeout: float) -> None:
        self._step_timeout = step_timeout
        self._load_timeout = load_timeout
        self._heard_at = now
        self._progress_at = now
        self._looked_at = now
        self._loading_since: float | None = None
        self._steps = 0
        self._busy = False
        self._started = False

    def patience(self, step_timeout: float, load_timeout: float) -> None:
        """Other deadlines from now on."""
        self._step_timeout, self._load_timeout = step_timeout, load_timeout

    def heard(self, now: float) -> None:
        """Any message came."""
        self._started = True
        self._heard_at = now

    def settled(self, now: float) -> None:
        """A step was settled."""
        self._heard_at = self._progress_at = now

    def report(self, report: LoadReport, now: float) -> None:
        self.heard(now)
        busy = report.phase == "step" or any(engine.running or engine.waiting for engine in report.engines)
        if report.steps != self._steps or not (busy and self._busy):
            self._progress_at = now
        self._steps, self._busy = report.steps, busy

    def loading(self, now: float, unfinished: bool) -> None:
        """A load began or ended; ``unfinished`` when one is still to come."""
        self._loading_since = now if unfinished else None

    def verdict(self, now: float, tick: float) -> Fault | None:
        """Why the worker is stuck, or None. Called every ``tick`` seconds."""
        if now - self._looked_at > 3 * tick + 1:
            # This process itself stood still and has not read what came meanwhile: the silence is its own.
            self._heard_at = self._progress_at = now
        self._looked_at = now
        # The next look would be too late to find it within the time.
        due = now + tick
        if due - self._heard_at > self._silence:
            return Fault("silent", f"it said nothing for {now - self._heard_at:.1f} s")
        if self._busy and due - self._progress_at > self._step_timeout:
            return Fault("no_step", f"it settled no step for {now - self._progress_at:.1f} s")
        if self._loading_since is not None and now - self._loading_since > self._load_timeout:
            return Fault("load_timeout", f"the load took more than {self._load_timeout:.0f} s")
        return None

    @property
    def _silence(self) -> float:
        """Longest time without a message."""
        calm = self._started and self._loading_since is None
        return self._step_timeout if calm else max(self._step_timeout, START_PATIENCE)


class Backoff:
    """A budget of restarts, the first at once and the others after pauses that double; a settled step resets it."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        """May be replaced at any time."""
        self._failures = 0

    def failed(self) -> float | None:
        """Seconds to wait before the next start; None when the budget is spent."""
        self._failures += 1
        if self._failures > self.budget:
            return None
        return min(LONGEST_PAUSE, SECOND_PAUSE * 2.0 ** (self._failures - 2)) if self._failures > 1 else 0.0

    def settled(self) -> None:
        self._failures = 0
