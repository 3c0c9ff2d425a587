"""Measures how long steps take in a server that answers clients, and writes them as the simulator's coefficients.

    python -m benchmarks.served_steps --device cpu                       after benchmarks.step_times on this machine
    python -m benchmarks.served_steps --device cuda --config r1-1.5b

An engine alone (``benchmarks.step_times``) is faster than one whose machine also runs the API process and the clients:
on two cores by up to a tenth. So the real server logs its steps under mixed traffic, and the costs are fitted to
those. Host and gap stay those that were measured alone. The traffic is none that ``benchmarks.live_check`` sends.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks import report
from benchmarks.live_traffic import live_grid, mixed_traffic, served_model, vocabulary
from benchmarks.model_configs import CONFIGS
from benchmarks.simulation import fitting
from benchmarks.simulation.coefficients import Coefficients, StepSample, StepShape, quantiles, read, write
from benchmarks.simulation.grid import Grid
from benchmarks.simulation.live import drive

SEED = 9001
MOST_SHAPES = 400
"""Steps are merged until so few kinds are left: the fit takes the median of each."""
LINE = re.compile(r"step: (\{.*\})$", re.MULTILINE)


class LoggedWork(msgspec.Struct):
    rows: int
    tokens: int
    decode_pairs: float
    prompt_pairs: float
    prompt_start: int = 0
    padding: int = 0
    """Tokens that filled a captured graph up."""

    @property
    def computed(self) -> int:
        return self.tokens + self.padding


class LoggedStep(msgspec.Struct):
    """One line of the worker's log."""

    took: float
    work: LoggedWork


def logged_steps(log: Path) -> list[LoggedStep]:
    """In the order in which they settled. Raises msgspec.ValidationError on a line of another form."""
    return [msgspec.json.decode(line, type=LoggedStep) for line in LINE.findall(log.read_text(errors="replace"))]


def merged(steps: Sequence[LoggedStep], most: int = MOST_SHAPES) -> list[StepSample]:
    """Steps of about one size as repeats of their mean size; sizes are told apart ever less until ``most`` are left."""
    sizes_in_a_doubling = 32.0
    while True:
        groups: dict[tuple[int, ...], list[LoggedStep]] = defaultdict(list)
        for step in steps:
            groups[_size(step.work, sizes_in_a_doubling)].append(step)
        if len(groups) <= most:
            return [_sample(group) for group in groups.values()]
        sizes_in_a_doubling /= 2


def _size(work: LoggedWork, sizes_in_a_doubling: float) -> tuple[int, ...]:
    figures = (work.rows, work.computed, work.decode_pairs, work.prompt_pairs, work.prompt_start)
    return tuple(round(sizes_in_a_doubling * math.log2(1 + figure)) for figure in figures)


def _sample(group: Sequence[LoggedStep]) -> StepSample:
    works = [step.work for step in group]
    shape = StepShape(
        rows=round(sum(work.rows for work in works) / len(works)),
        tokens=round(sum(work.computed for work in works) / len(works)),
        decode_pairs=sum(work.decode_pairs for work in works) / len(works),
        prompt_pairs=sum(work.prompt_pairs for work in works) / len(works),
        prompt_start=round(sum(work.prompt_start for work in works) / len(works)),
    )
    return StepSample(shape=shape, seconds=[step.took for step in group])


def fitted(alone: Coefficients, steps: Sequence[LoggedStep]) -> Coefficients:
    """``alone`` with the costs and the spread of the logged steps."""
    samples = merged(steps)
    costs = fitting.fit(samples)
    off = [step.took / costs.seconds(_sample([step]).shape) for step in steps]
    return msgspec.structs.replace(
        alone,
        note="python -m benchmarks.served_steps",
        costs=costs,
        deviations=quantiles(off, 41),
        residuals=[1.0, 1.0],
        errors=fitting.error_summary(costs, samples),
        samples=samples,
    )


def fit_served(grid: Grid, steps: Sequence[LoggedStep], facts: dict[str, object]) -> None:
    """Write what the steps of a server say, beside the coefficients that were measured alone, and print both."""
    name = grid.coefficients.removesuffix("_served")
    alone = read(name)
    served = msgspec.structs.replace(fitted(alone, steps), machine=facts)
    slower = sorted(step.took / alone.costs.seconds(_sample([step]).shape) for step in steps)
    print(f"{len(steps)} steps, {slower[len(slower) // 2]:.2f} times as long as alone (median)")
    print(f"fitted: {served.costs}")
    print(f"relative error p50 {served.errors['p50']:.1%}, p95 {served.errors['p95']:.1%}")
    print(f"written to {write(f'{name}_served', served).relative_to(report.ROOT)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--config", choices=list(CONFIGS), default="r1-1.5b", help="shapes on a GPU, random weights")
    parser.add_argument("--seconds", type=float, default=60.0, help="of traffic at each load of the live grid")
    arguments = parser.parse_args()
    grid = live_grid(arguments.device)
    facts = report.print_header(f"Step times in service: {read(grid.coefficients.removesuffix('_served')).model}")
    facts["device"] = "cpu" if arguments.device == "cpu" else report.device_name()
    words = vocabulary(arguments.device, arguments.config)
    clients = max(1, min(6, len(os.sched_getaffinity(0)) // 2))
    with served_model(arguments.device, arguments.config, log_level="debug") as server:
        for index, load in enumerate(grid.loads):
            requests = mixed_traffic(grid, load, arguments.seconds, SEED + index)
            drive(server.url, "m", words, requests, processes=clients, nonce=SEED + index)
        steps = logged_steps(server.log)
    fit_served(grid, steps, facts)


if __name__ == "__main__":
    main()
