"""Which item kills workers? Strikes, suspects and the one that is ended. Pure: no clock, no process.

A worker that dies takes a whole step with it, so each death names up to a few hundred items. An item that was in a
launched step at a death, and has had no token since its last strike, gets a strike; any token clears it. With two
strikes it is a suspect and runs alone. Only a suspect that was alone at a death is guilty, so bystanders always go on.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

STRIKES = 2
"""Deaths in a row that make an item a suspect."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one death means for those who were there."""

    struck: frozenset[int]
    """Items that got a strike."""
    guilty: int | None = None
    """The suspect that was alone: it must not be tried again."""


class Blame:
    """Strikes of all open items, by item number."""

    def __init__(self) -> None:
        self._strikes: dict[int, int] = {}

    def died(self, launched: Collection[int], *, alone: bool) -> Verdict:
        """A worker died with these items in launched steps; ``alone`` when nothing else was in them."""
        struck = frozenset(launched)
        if alone and len(struck) == 1 and self.suspects(item := next(iter(struck))):
            self.forget(item)
            return Verdict(struck, item)
        for item in struck:
            self._strikes[item] = self._strikes.get(item, 0) + 1
        return Verdict(struck)

    def suspects(self, item: int) -> bool:
        return self._strikes.get(item, 0) >= STRIKES

    def forget(self, item: int) -> None:
        """It had a token, or it has ended."""
        self._strikes.pop(item, None)
