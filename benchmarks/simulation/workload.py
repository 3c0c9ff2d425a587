"""The requests of one run: lengths and arrivals of a row of the grid, stretched to a load."""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmarks.simulation.arrivals import arrivals
from benchmarks.simulation.capacity import demand, request_work
from benchmarks.simulation.coefficients import StepCosts
from benchmarks.simulation.grid import Grid, GridRow, Part, Targets
from benchmarks.simulation.traces import Half, Recorded, half
from engines.protocol import SamplingParams
from server.worker.wire import Item, Priority

STOP_TOKEN, OTHER_TOKEN = 1, 0
TRACE_BLOCK = 512
"""Tokens in one block of a trace that records which blocks are equal."""
LARGEST_WINDOW = 2 / 3
"""Of a half of a trace that one run may take, so that seeds differ."""


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """One request as its client sees it. Times in seconds, lengths in tokens."""

    number: int
    arrival: float
    prompt: int
    output: int
    targets: Targets
    priority: Priority = "normal"
    tenant: str = ""
    blocks: tuple[int, ...] = ()

    def tokens(self) -> list[int]:
        """Equal to another request's only as far as the trace says so."""
        if not self.blocks:
            return [self.number + 2] * self.prompt
        known = [-1 - block for block in self.blocks[: self.prompt // TRACE_BLOCK] for _ in range(TRACE_BLOCK)]
        return known + [self.number + 2] * (self.prompt - len(known))

    def item(self, max_output: int | None, aims: bool) -> Item:
        """``aims`` tells the scheduler the targets; without ``max_output`` it is told where the stream will end."""
        return Item(
            item=self.number,
            request=self.number,
            engine="m",
            tokens=self.tokens(),
            prompt_length=self.prompt,
            max_tokens=max_output or self.output,
            sampling=SamplingParams(seed=self.number, stop_token_ids=(STOP_TOKEN,)),
            priority=self.priority,
            tenant=self.tenant,
            ttft=self.targets.first_token(self.prompt) if aims else None,
            tpot=self.targets.tpot if aims else None,
            firm=aims,
        )


def workload(grid: Grid, row: GridRow, load: float, seed: int, which: Half, costs: StepCosts) -> list[SimulatedRequest]:
    """Requests in the order of arrival. The work that they bring a second is ``load`` times that of the capacity."""
    randomness = random.Random(f"{row.name} {load} {seed} {which}")
    rate = load * row.capacity
    seconds = row.seconds or grid.seconds
    if which == "training":
        seconds *= grid.training_seconds / grid.seconds
    if row.arrivals == "trace":
        chosen, seconds = _window(row, round(rate * seconds), which, randomness)
    else:
        chosen = _drawn(row, arrivals(row.arrivals, rate, seconds, randomness), which, randomness)
    work = sum(request_work(costs, request.prompt, request.output) for _, request in chosen)
    stretch = work / (rate * demand(costs, row, "training").work) / seconds
    return [
        SimulatedRequest(
            number=number,
            arrival=request.time * stretch,
            prompt=request.prompt,
            output=min(request.output, grid.max_output),
            targets=grid.targets[part.targets],
            priority=part.priority,
            tenant=part.tenant,
            blocks=request.blocks,
        )
        for number, (part, request) in enumerate(chosen)
    ]


def _window(
    row: GridRow, count: int, which: Half, randomness: random.Random
) -> tuple[list[tuple[Part, Recorded]], float]:
    """Requests that follow each other in the trace, with their times from the first, and the seconds they took."""
    part = row.parts[0]
    trace = half(part.lengths, which, row.length_scale)
    count = max(2, min(count, int(len(trace) * LARGEST_WINDOW)))
    first = randomness.randrange(len(trace) - count + 1)
    window = trace[first : first + count]
    began = window[0].time
    requests = [
        (part, Recorded(request.time - began, request.prompt, request.output, request.blocks)) for request in window
    ]
    return requests, window[-1].time - began


def _drawn(row: GridRow, times: list[float], which: Half, randomness: random.Random) -> list[tuple[Part, Recorded]]:
    """Each arrival's part by the shares, and its lengths from the part's trace."""
    parts = randomness.choices(row.parts, [part.share for part in row.parts], k=len(times))
    requests = []
    for part, time in zip(parts, times, strict=True):
        like = randomness.choice(half(part.lengths, which, row.length_scale))
        requests.append((part, Recorded(time, like.prompt, like.output)))
    return requests
