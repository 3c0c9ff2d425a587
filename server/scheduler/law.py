"""Which rules a scheduler follows. Operators choose a policy by name; comparisons switch single rules off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Policy = Literal["adaptive", "aimd", "static"]


@dataclass(frozen=True, slots=True)
class Law:
    """Each field is one part of the adaptive scheduler that can be done without."""

    deadline_order: bool = True
    """Prompts go by the deadline of their first token; otherwise first come, first served."""
    late_drop: bool = True
    """Firm items that must miss their first token are refused before they cost anything more."""
    budget: Literal["slack", "aimd", "fixed"] = "slack"
    """What bounds a step: the least slack of the residents, a halved or doubled size, or the configured tokens."""
    fairness: bool = True
    """Inside a class the tenant that was served least goes first."""
    priorities: bool = True


LAWS: dict[Policy, Law] = {
    "adaptive": Law(),
    "aimd": Law(deadline_order=False, late_drop=False, budget="aimd"),
    "static": Law(deadline_order=False, late_drop=False, budget="fixed", fairness=False, priorities=False),
}
"""``aimd`` and ``static`` are there to be compared with."""
