"""Which settled steps say nothing of how long steps take."""

from __future__ import annotations

import math
from typing import Literal

ABSURD = 5.0
PATIENCE = 4
"""A step this many times off the prediction is ignored (a page fault storm, a suspended machine), but not so many in
a row: then the machine itself has changed."""

Ignored = Literal["", "no time", "far off"]
"""Why a step was not learned from; the empty string where it was."""


class Outliers:
    """Judges the measured times of one kind of step, in the order in which they come."""

    def __init__(self) -> None:
        self.changed = False
        """The last one was the latest of so many far off that the machine must have changed."""
        self._in_a_row = 0

    def judge(self, seconds: float, expected: float) -> Ignored:
        """Why ``seconds`` should be ignored where so many were ``expected``, or 0 where nothing was known yet."""
        self.changed = False
        if not (math.isfinite(seconds) and seconds > 0):
            return "no time"
        if not expected or expected / ABSURD <= seconds <= expected * ABSURD:
            self._in_a_row = 0
            return ""
        self._in_a_row += 1
        if self._in_a_row <= PATIENCE:
            return "far off"
        self._in_a_row = 0
        self.changed = True
        return ""
