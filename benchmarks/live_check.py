"""The simulator against reality: the same requests to a real server and to the simulated one.

    python -m benchmarks.live_check --device cpu                  SmolLM2, twenty minutes; or row by row, --rows NAME
    python -m benchmarks.live_check --device cuda --config r1-1.5b

Rows, loads and targets are those of benchmarks/simulation/live_cpu.toml and live_gpu.toml. Compares goodput, and the
quantiles of TTFT and TPOT of what was let in: p90 on the CPU, p99 on a GPU. Step times must have been measured on this
machine before (benchmarks.step_times).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks import report
from benchmarks.live_traffic import live_grid, served_model, vocabulary
from benchmarks.model_configs import CONFIGS
from benchmarks.simulation.coefficients import Coefficients, read
from benchmarks.simulation.grid import Grid, GridRow
from benchmarks.simulation.live import drive
from benchmarks.simulation.policies import OURS
from benchmarks.simulation.run import Outcome, Simulation
from benchmarks.simulation.scoring import Score, mean_interval, score_outcomes
from benchmarks.simulation.workload import SimulatedRequest, workload

GOODPUT_BAR, QUANTILE_BAR = 0.07, 0.12
"""How far the simulator may be from reality, relative."""


class Check:
    """One server, and the simulator beside it."""

    def __init__(self, grid: Grid, coefficients: Coefficients, url: str, processes: int, vocabulary: int) -> None:
        self._grid = grid
        self._coefficients = coefficients
        self._url = url
        self._processes = processes
        self._vocabulary = vocabulary
        self._nonce = int.from_bytes(os.urandom(2), "big")

    def warm(self) -> None:
        """Traffic that teaches the server its step times."""
        self._real(self._requests(self._grid.rows[0], self._grid.loads[0], 0))

    def compare(self, row: GridRow, load: float, seed: int) -> tuple[Score, Score]:
        """Scores of the real server and of the simulated one."""
        requests = self._requests(row, load, seed)
        real = score_outcomes(self._real(requests), load)
        simulation = Simulation(OURS, self._coefficients, requests, max_output=None, seed=seed)
        return real, score_outcomes(simulation.run().outcomes, load)

    def _requests(self, row: GridRow, load: float, seed: int) -> list[SimulatedRequest]:
        return workload(self._grid, row, load, seed, "scoring", self._coefficients.costs)

    def _real(self, requests: Sequence[SimulatedRequest]) -> list[Outcome]:
        self._nonce += 1
        return drive(self._url, "m", self._vocabulary, requests, processes=self._processes, nonce=self._nonce)


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of one row and load: means over the repeats with half their 95 % intervals."""

    row: str
    load: float
    figure: str
    real: tuple[float, float]
    simulated: tuple[float, float]
    bar: float | None
    """None where the figure is there to explain the others."""

    @property
    def difference(self) -> float:
        """Of the simulator, relative to reality."""
        return self.simulated[0] / self.real[0] - 1 if self.real[0] else 0.0

    @property
    def held(self) -> bool:
        return self.bar is None or abs(self.difference) <= self.bar

    def text(self) -> str:
        (real, half), (simulated, _) = self.real, self.simulated
        verdict = "" if self.bar is None else f"{'within' if self.held else 'BEYOND'} {self.bar:.0%}"
        return (
            f"| {self.row} | {self.load} | {self.figure} | {real:.4g} ± {half:.2g} | {simulated:.4g} "
            f"| {self.difference:+.1%} | {verdict} |"
        )


def lines(row: str, load: float, pairs: Sequence[tuple[Score, Score]], tail: str) -> list[Line]:
    """``tail`` is the quantile to compare: p90 or p99."""
    figures = {"goodput": GOODPUT_BAR, "refused": None, f"ttft_{tail}": QUANTILE_BAR, f"tpot_{tail}": QUANTILE_BAR}
    return [
        Line(
            row=row,
            load=load,
            figure=figure,
            real=mean_interval([getattr(real, figure) for real, _ in pairs]),
            simulated=mean_interval([getattr(simulated, figure) for _, simulated in pairs]),
            bar=bar,
        )
        for figure, bar in figures.items()
    ]


def check_row(check: Check, grid: Grid, row: GridRow, tail: str) -> list[Line]:
    """Every load of a row, each printed when it is there."""
    found = []
    for load in grid.loads:
        pairs = [check.compare(row, load, seed) for seed in grid.seeds]
        of_cell = lines(row.name, load, pairs, tail)
        print("\n".join(line.text() for line in of_cell), flush=True)
        found += of_cell
    return found


def record(name: str, grid: Grid, row: GridRow, facts: dict[str, object], found: Sequence[Line]) -> Path:
    """The row takes the place of the one on record; the others stay, each with its machine and commit."""
    entry = {
        "machine": facts,
        "row": msgspec.to_builtins(row),
        "seeds": grid.seeds,
        "seconds": grid.seconds,
        "lines": [msgspec.to_builtins(line) for line in found],
    }
    known = report.read(name).get("rows", {})
    return report.write(name, {"rows": known | {row.name: entry}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--config", choices=list(CONFIGS), default="r1-1.5b", help="shapes on a GPU, random weights")
    parser.add_argument("--rows", nargs="+", metavar="NAME")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--seconds", type=float, help="of arrivals in each run; default: what the file says")
    parser.add_argument("--clients", type=int, help="client processes; default: one on two cores, at most six")
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    grid = live_grid(arguments.device)
    rows = [row for row in grid.rows if not arguments.rows or row.name in arguments.rows]
    seconds = arguments.seconds or grid.seconds
    grid = msgspec.structs.replace(grid, rows=rows, seeds=grid.seeds[: arguments.repeats], seconds=seconds)
    coefficients = read(grid.coefficients)
    facts = report.print_header(f"Simulator against reality: {coefficients.model}, step times {coefficients.origin}")
    facts["device"] = "cpu" if on_cpu else report.device_name()
    clients = arguments.clients or max(1, min(6, len(os.sched_getaffinity(0)) // 2))
    held = True
    with served_model(arguments.device, arguments.config) as server:
        check = Check(grid, coefficients, server.url, clients, vocabulary(arguments.device, arguments.config))
        check.warm()
        print(
            "| row | load | figure | real | simulated | difference | bar |\n|---|---|---|---|---|---|---|", flush=True
        )
        for row in grid.rows:
            found = check_row(check, grid, row, "p90" if on_cpu else "p99")
            path = record(f"live_check_{arguments.device}", grid, row, facts | {"clients": clients}, found)
            held = held and all(line.held for line in found)
    print(f"written to {path.relative_to(report.ROOT)}")
    if not held:
        raise SystemExit("the bar is missed")


if __name__ == "__main__":
    main()
