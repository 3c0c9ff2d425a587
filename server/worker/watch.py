"""When a worker counts as stuck, and how long to wait before the next one is started. Pure: time comes in."""

from __future__ import annotations

from server.worker.wire import LoadReport

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds of back-off."""


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

    def heard(self, now: float) -> None:
        """Any message came."""
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

    def verdict(self, now: float, tick: float) -> str | None:
        """Why the worker is stuck, or None. Called every ``tick`` seconds."""
        if now - self._looked_at > 3 * tick + 1:
            # This process itself stood still and has not read what came meanwhile: the silence is its own.
            self._heard_at = self._progress_at = now
        self._looked_at = now
        if now - self._heard_at > self._step_timeout:
            return f"it said nothing for {now - self._heard_at:.1f} s"
        if self._busy and now - self._progress_at > self._step_timeout:
            return f"it settled no step for {now - self._progress_at:.1f} s"
        if self._loading_since is not None and now - self._loading_since > self._load_timeout:
            return f"the load took more than {self._load_timeout:.0f} s"
        return None


class Backoff:
    """Pauses that double, and a budget of restarts; both start afresh after a settled step."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._failures = 0

    def failed(self) -> float | None:
        """Seconds to wait before the next start; None when the budget is spent."""
        self._failures += 1
        if self._failures > self._budget:
            return None
        return float(min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (self._failures - 1)))

    def settled(self) -> None:
        self._failures = 0
