"""How long steps take on the CPU, measured at load: the first requests are scheduled by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from engines.protocol import StepSample

SECONDS = 0.5
"""Time that all samples together may take."""
SHORT = 0.03
"""Shorter steps are run twice and the faster one counts: the first of a size allocates, others disturb."""
LEAST = 4
"""Fewer samples than this say too little: then the scheduler learns from the first steps that it sees."""


class Steps(Protocol):
    """What runs them: ``Probe``."""

    def seconds(self, rows: list[tuple[int, int]]) -> float:
        """Run one step of these rows, (tokens before, tokens computed), and say how long it took."""


def measure(steps: Steps, max_rows: int, longest: int, clock: Callable[[], float]) -> tuple[StepSample, ...]:
    """Samples of decodes and of prompts up to ``longest`` tokens, small steps first, as many as there is time for."""
    started = clock()
    samples: list[StepSample] = []
    for rows in _sizes(max_rows, longest):
        seconds = steps.seconds(rows)
        if seconds < SHORT:
            seconds = min(seconds, steps.seconds(rows))
        samples.append(_sample(rows, seconds))
        # The next step takes about twice as long.
        if clock() - started + 2 * seconds > SECONDS:
            break
    return tuple(samples) if len(samples) >= LEAST else ()


def _sizes(max_rows: int, longest: int) -> list[list[tuple[int, int]]]:
    """(tokens before, tokens computed) of each row, step by step: prompts, and decodes in short and long contexts."""
    few, many = min(8, max_rows), min(32, max_rows)
    steps = [
        [(0, 1)],
        [(0, min(16, longest))],
        [(longest - 1, 1)] * few,
        [(longest // 2, 1)] * many,
        [(0, min(128, longest))],
        [(0, min(256, longest))],
        [(0, longest)],
    ]
    return [rows for index, rows in enumerate(steps) if rows not in steps[:index]]


def _sample(rows: list[tuple[int, int]], seconds: float) -> StepSample:
    return StepSample(
        rows=len(rows),
        tokens=sum(count for _, count in rows),
        decode_pairs=sum(start + 1 for start, count in rows if count == 1),
        prompt_pairs=sum(count * (start + (count + 1) / 2) for start, count in rows if count > 1),
        prompt_start=max((start for start, count in rows if count > 1), default=0),
        seconds=seconds,
    )
