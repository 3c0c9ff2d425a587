"""The rate of requests at which a device is full, from its coefficients alone: it depends on no policy.

In a steady state of rate r whose steps take s seconds, each step computes r * s requests' worth of work, and
r * s * output tokens streams are open. So the work of a step, ``bases + r * s * work of a request``, must fit in s,
and its rows, tokens and KV blocks in the engine's capacity. Longer steps pay the base less often; the shortest target
of a later token bounds them. The capacity is the highest r over all s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.simulation.coefficients import Coefficients, StepCosts, StepShape
from benchmarks.simulation.grid import Grid, GridRow
from benchmarks.simulation.traces import Half, half

_STEP_LENGTHS = 200
"""Step lengths tried between the shortest that the device can do and the longest allowed."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What the mean request of a row asks of the device."""

    work: float
    """Seconds, without any step's base."""
    tokens: float
    """Prompt and output."""
    outputs: float
    resident: float
    """Tokens in the KV cache, summed over the steps that it stays."""


def request_work(costs: StepCosts, prompt: int, output: int) -> float:
    """Seconds that one request adds to the steps that it is in."""
    later = output - 1
    return costs.work(
        StepShape(
            rows=output,
            tokens=prompt + later,
            decode_pairs=later * (prompt + output / 2),
            prompt_pairs=prompt * (prompt + 1) / 2,
        )
    )


def demand(costs: StepCosts, row: GridRow, which: Half) -> Demand:
    """Means over the recorded lengths of a row's parts, by their shares."""
    sums = [0.0, 0.0, 0.0, 0.0]
    for part in row.parts:
        requests = half(part.lengths, which, row.length_scale)
        for request in requests:
            prompt, output = request.prompt, request.output
            figures = (request_work(costs, prompt, output), prompt + output, output, output * (prompt + output / 2))
            for index, figure in enumerate(figures):
                sums[index] += part.share * figure / len(requests)
    return Demand(*sums)


def requests_per_second(coefficients: Coefficients, wanted: Demand, longest_step: float) -> float:
    """The highest rate that fits, with steps of at most ``longest_step`` seconds."""
    costs = coefficients.costs
    shortest = min(costs.floor or costs.base + costs.prompt_base, longest_step)
    lengths = (shortest + (longest_step - shortest) * n / _STEP_LENGTHS for n in range(1, _STEP_LENGTHS + 1))
    return max(_rate(coefficients, wanted, seconds) for seconds in lengths)


def _rate(coefficients: Coefficients, wanted: Demand, step: float) -> float:
    costs, capacity = coefficients.costs, coefficients.capacity
    rows = capacity.max_rows
    if costs.floor_row:
        rows = min(rows, max(0, int((step - costs.floor) / costs.floor_row)))
    return min(
        max(0.0, step - costs.base - costs.prompt_base) / (step * wanted.work),
        rows / (step * wanted.outputs),
        capacity.max_step_tokens / (step * wanted.tokens),
        capacity.blocks * capacity.block_size / (step * wanted.resident),
    )


def capacities(grid: Grid, coefficients: Coefficients) -> Iterable[tuple[str, float]]:
    """By row, from the training halves."""
    for row in grid.rows:
        wanted = demand(coefficients.costs, row, "training")
        longest = min(grid.targets[part.targets].tpot for part in row.parts)
        yield row.name, requests_per_second(coefficients, wanted, longest)
