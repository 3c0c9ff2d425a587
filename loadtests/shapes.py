"""How many users there are at a moment of a run."""

from __future__ import annotations

from typing import Literal, get_args

Shape = Literal["steady", "ramp", "burst", "spike"]
SHAPES: tuple[Shape, ...] = get_args(Shape)

CALM = 1 / 3
"""Share of the users between bursts, and before and after a spike."""
BURSTS = 5
"""In a run; each takes half of its fifth."""
SPIKE_FROM, SPIKE_TO = 0.4, 0.6
"""Shares of the run."""


def users_at(shape: Shape, elapsed: float, seconds: float, most: int) -> int:
    """``most`` at the highest, one at least. steady: always so many. ramp: from one to so many at the run's end.
    burst: so many in five bursts. spike: so many in the fifth in the middle. After ``seconds`` bursts and spikes come
    again, and a ramp stays at its top."""
    if shape == "steady":
        return most
    if shape == "ramp":
        return max(1, round(most * min(1.0, elapsed / seconds)))
    place = elapsed / seconds % 1
    high = place * BURSTS % 1 >= 0.5 if shape == "burst" else SPIKE_FROM <= place < SPIKE_TO
    return most if high else max(1, round(most * CALM))
