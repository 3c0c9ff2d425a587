"""How long a step takes on one machine with one model: measured coefficients, stored with the machine they are of."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from engines.protocol import Capacity, StepPlan

FOLDER = Path(__file__).parent / "coefficients"


class StepShape(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The size of a step, as far as its time depends on it. A decode is a row that computes one token."""

    rows: int
    tokens: int
    decode_pairs: float = 0.0
    """Query-key pairs of the decodes: memory traffic."""
    prompt_pairs: float = 0.0
    """Query-key pairs of longer rows: arithmetic."""
    prompt_start: int = 0
    """Most earlier tokens of a longer row."""


def shape_of(plan: StepPlan) -> StepShape:
    """Size of a plan's sequence rows, with what fills a captured graph up."""
    tokens = prompt_start = 0
    decode_pairs = prompt_pairs = 0.0
    for row in plan.rows:
        count = row.count
        tokens += count
        if count == 1:
            decode_pairs += row.start + 1
        else:
            prompt_pairs += count * (row.start + (count + 1) / 2)
            prompt_start = max(prompt_start, row.start)
    tokens = max(tokens, plan.graph_rows, plan.graph_tokens)
    return StepShape(
        rows=len(plan.rows),
        tokens=tokens,
        decode_pairs=decode_pairs,
        prompt_pairs=prompt_pairs,
        prompt_start=prompt_start,
    )


class StepCosts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """seconds = max(floor + floor_row * rows, base + the costs of tokens, rows, pairs and prompts), all in seconds.

    The floor is what a step takes however small it is: the host that enqueues kernels one by one, or the weights that
    are read once. Up to there, more tokens cost nothing. A step with prompts costs ``prompt_base`` more, and
    ``prompt_start`` for each earlier token of the row that has the most.
    """

    floor: float = 0.0
    floor_row: float = 0.0
    base: float = 0.0
    token: float = 0.0
    row: float = 0.0
    decode_pair: float = 0.0
    prompt_pair: float = 0.0
    prompt_base: float = 0.0
    prompt_start: float = 0.0

    def work(self, shape: StepShape) -> float:
        """Seconds of the second branch without its bases: what adds up over steps."""
        return (
            self.token * shape.tokens
            + self.row * shape.rows
            + self.decode_pair * shape.decode_pairs
            + self.prompt_pair * shape.prompt_pairs
        )

    def seconds(self, shape: StepShape) -> float:
        """Typical time of a step."""
        prompts = self.prompt_base + self.prompt_start * shape.prompt_start if shape.prompt_pairs else 0.0
        return max(self.floor + self.floor_row * shape.rows, self.base + self.work(shape) + prompts)


class HostCosts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of the worker's loop a step and a row of it, while the device may work on the next step."""

    step: float = 0.0
    row: float = 0.0

    def seconds(self, rows: int) -> float:
        return self.step + self.row * rows


class StepSample(msgspec.Struct, frozen=True, kw_only=True):
    """Repeats of one step."""

    shape: StepShape
    seconds: list[float]


class Coefficients(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine on one machine, as the simulator sees it."""

    model: str
    origin: Literal["measured", "estimated"]
    note: str
    """How the figures came about: the command, or the arithmetic."""
    machine: dict[str, object]
    capacity: Capacity
    costs: StepCosts
    host: HostCosts
    gap: float
    """Seconds between two steps in which the device waits, however far ahead they are launched."""
    deviations: list[float]
    """Quantiles, evenly spaced from least to most, of a step's time over the median of identical steps."""
    residuals: list[float]
    """Likewise of the median of identical steps over the fitted time: what the coefficients do not explain."""
    errors: dict[str, float] = {}
    """Relative errors of the fit over the samples: p50 and p95."""
    samples: list[StepSample] = []

    def drawn(self, shape: StepShape, uniform: float) -> float:
        """Time of one step; ``uniform`` in [0, 1) picks its deviation from the typical time.

        The residual is one for all steps of about one size, so that a model of the same form as ``costs`` is wrong
        in the simulator as it is on the machine.
        """
        size = (_SIZES * math.log2(1 + count) for count in (shape.tokens, shape.rows))
        residual = _at(self.residuals, _fixed_share(*map(int, size)))
        return self.costs.seconds(shape) * _at(self.deviations, uniform) * residual


_SIZES = 2
"""Sizes of tokens, and of rows, in one doubling, that share a residual."""


@cache
def _fixed_share(tokens_size: int, rows_size: int) -> float:
    return random.Random(f"{tokens_size} {rows_size}").random()


def _at(ordered: Sequence[float], share: float) -> float:
    """Quantile of ascending values, linear between them."""
    place = share * (len(ordered) - 1)
    below = int(place)
    return ordered[below] + (place - below) * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])


def quantiles(values: Sequence[float], count: int) -> list[float]:
    """``count`` evenly spaced quantiles, the least and the greatest among them."""
    ordered = sorted(values)
    return [ordered[round(index * (len(ordered) - 1) / (count - 1))] for index in range(count)]


def read(name: str) -> Coefficients:
    """A file of the folder ``coefficients`` by its name. Raises FileNotFoundError or msgspec.ValidationError."""
    return msgspec.json.decode((FOLDER / f"{name}.json").read_bytes(), type=Coefficients)


def write(name: str, coefficients: Coefficients) -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(coefficients), indent=1) + b"\n")
    return path
