"""What a priority class may claim: its rank, the next higher one after a long wait, and a floor below which none falls.

Served tokens are those of prompts, and for items that end after one step, their rows.
"""

from __future__ import annotations

from server.scheduler.law import Law

CLASSES = 3
AGEING = 10.0
"""Seconds of waiting after which an item counts for the class above."""
FLOOR = 0.05
"""Least share of served tokens of a class that waits."""
QUANTUM = 64
"""Tokens that a class must lack before its floor counts: it gets a turn now and then, not a race."""
WINDOW = 100_000
"""Tokens over which that share is taken."""


class ClassShares:
    """Counts who waits and who was served, by rank; 0 is the highest."""

    def __init__(self, law: Law) -> None:
        self._law = law
        self._served = [0.0] * CLASSES
        self._waiting = [0] * CLASSES

    def waits(self, rank: int) -> bool:
        """Some item of the class waits."""
        return self._waiting[rank] > 0

    def came(self, rank: int) -> None:
        """One more item waits."""
        if not self._waiting[rank]:
            # A class that was away has no claim on the share that it did not use.
            self._served[rank] = max(self._served[rank], FLOOR * sum(self._served))
        self._waiting[rank] += 1

    def left(self, rank: int) -> None:
        """One item less waits."""
        self._waiting[rank] -= 1

    def served(self, rank: int, tokens: int) -> None:
        """Tokens of this class are in a step now."""
        self._served[rank] += tokens
        if sum(self._served) > WINDOW:
            self._served = [tokens / 2 for tokens in self._served]

    def starved(self, rank: int) -> bool:
        """The class waits and had less than its floor."""
        return self._waiting[rank] > 0 and self._served[rank] + QUANTUM < FLOOR * sum(self._served)

    def overtakes(self, rank: int, waited: float) -> bool:
        """An item that goes next owes it to its age: it waited so many seconds, and one of a higher class waits on."""
        return any(self._waiting[:rank]) and self.present_rank(rank, waited) < rank

    def present_rank(self, rank: int, waited: float) -> int:
        """The rank that counts now for an item of the class that waited so many seconds; -1 goes before all."""
        if not self._law.priorities:
            return 0
        if self.starved(rank):
            return -1
        return max(0, rank - int(waited / AGEING)) if rank and waited > AGEING else rank
