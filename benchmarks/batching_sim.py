"""Batching policies against each other in simulated time: the server's own scheduler, measured step times.

    python -m benchmarks.batching_sim                       benchmarks/simulation/grid.toml: 5,000 runs of 1 to 3 s
    python -m benchmarks.batching_sim --quick               two seeds and shorter runs
    python -m benchmarks.batching_sim --rows code flood
    python -m benchmarks.batching_sim --journal FILE        go on where an earlier run with this file was stopped
    python -m benchmarks.batching_sim --capacities          set the grid's capacities after a change of coefficients

The settings of the static baseline are chosen on the first half of each trace and scored on the second. Writes
benchmarks/results/batching_sim.json and .md and docs/images/batching_sim.svg (needs matplotlib).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from operator import attrgetter
from pathlib import Path

import msgspec

from benchmarks import report
from benchmarks.simulation.capacity import capacities
from benchmarks.simulation.coefficients import Coefficients, read
from benchmarks.simulation.experiment import Comparison, Runner
from benchmarks.simulation.grid import Grid, read_grid, write_capacities
from benchmarks.simulation.journal import Journal, world
from benchmarks.simulation.tables import bars, markdown
from benchmarks.simulation.traces import recorded

KEPT = ("goodput", "refused", "admitted_met", "worst_tenant", "ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "gap_p99")
"""Figures of a cell that are written down, means over its seeds."""
PICTURE = report.ROOT / "docs" / "images" / "batching_sim.svg"


def chosen_grid(arguments: argparse.Namespace) -> Grid:
    grid = read_grid()
    if arguments.rows:
        grid = msgspec.structs.replace(grid, rows=[row for row in grid.rows if row.name in arguments.rows])
    if arguments.quick:
        rows = [msgspec.structs.replace(row, seconds=row.seconds and row.seconds / 3) for row in grid.rows]
        grid = msgspec.structs.replace(
            grid, rows=rows, seeds=grid.seeds[:2], seconds=grid.seconds / 3, training_seconds=grid.training_seconds / 3
        )
    return grid


def notes(grid: Grid, coefficients: Coefficients) -> list[str]:
    """What a reader has to know beside the figures."""
    names = sorted({part.lengths for row in grid.rows for part in row.parts})
    absent = [name for name in names if not recorded(name)]
    machine = coefficients.machine.get("device", "?")
    return [
        f"Step times: {coefficients.model} on {machine}, {coefficients.origin} ({grid.coefficients}.json).",
        f"Traces: log-normal fits instead of recordings for {', '.join(absent)}." if absent else "Traces: recorded.",
        f"{len(grid.seeds)} seeds, {grid.seconds:g} s of arrivals a run.",
    ]


def write(comparison: Comparison, facts: dict[str, object], lines: list[str]) -> None:
    text = markdown(comparison, lines)
    (report.RESULTS / "batching_sim.md").write_text(text)
    cells = [
        {"policy": scores.policy.name, "row": row.name, "load": load}
        | {name: round(scores.mean(attrgetter(name), row=row.name, load=load), 4) for name in KEPT}
        for scores in comparison.all()
        for row in comparison.grid.rows
        for load in comparison.grid.loads
    ]
    held = [
        {"bar": bar.name, "figure": bar.figure, "interval": bar.interval, "held": bar.held} for bar in bars(comparison)
    ]
    grid = json.loads(msgspec.json.encode(comparison.grid))
    report.write("batching_sim", {"machine": facts, "notes": lines, "grid": grid, "bars": held, "cells": cells})
    from benchmarks.simulation.plot import draw  # needs matplotlib

    draw(comparison, PICTURE)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="NAME")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--capacities", action="store_true")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="keeps the scores of runs that are done")
    arguments = parser.parse_args()
    grid = chosen_grid(arguments)
    coefficients = read(grid.coefficients)
    if arguments.capacities:
        rates = dict(capacities(grid, coefficients))
        write_capacities(rates)
        print("\n".join(f"{name:20} {rate:8.2f} requests/s" for name, rate in rates.items()))
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("the picture needs matplotlib: pip install slimserve[dev]")
    facts = report.print_header("Batching policies in the simulator")
    lines = notes(grid, coefficients)
    print("\n".join(lines))
    began = time.perf_counter()

    def tell(text: str) -> None:
        print(f"  {time.perf_counter() - began:6.0f} s  {text}", flush=True)

    journal = Journal(arguments.journal, world(grid, coefficients)) if arguments.journal else None
    runner = Runner(grid, coefficients, arguments.jobs, tell, journal)
    write(runner.compare(), facts, lines)


if __name__ == "__main__":
    main()
