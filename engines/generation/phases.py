"""What the time of a load goes into."""

from __future__ import annotations

from collections.abc import Callable

from engines.protocol import LoadPhase


class PhaseTimes:
    """Phases that follow one another without gaps, from the making of this object on."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()
        self.phases: list[LoadPhase] = []

    def ended(self, name: str) -> None:
        """What has happened since the last call was this."""
        now = self._clock()
        self.phases.append(LoadPhase(name, now - self._began))
        self._began = now

    @property
    def seconds(self) -> float:
        """Of all phases so far."""
        return sum(phase.seconds for phase in self.phases)
