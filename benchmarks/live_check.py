"""The simulator against reality: the same requests to a real server and to the simulated one.

    python -m benchmarks.live_check --device cpu                  SmolLM2, about ten minutes
    python -m benchmarks.live_check --device cuda --config r1-1.5b

Rows, loads and targets are those of benchmarks/simulation/live_cpu.toml and live_gpu.toml. Compares goodput, and the
quantiles of TTFT and TPOT of what was let in: p90 on the CPU, p99 on a GPU. Step times must have been measured on this
machine before (benchmarks.step_times).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks import report
from benchmarks.model_configs import CONFIGS, config_folder
from benchmarks.servers import free_port, running, slimserve
from benchmarks.simulation.capacity import capacities
from benchmarks.simulation.coefficients import Coefficients, read
from benchmarks.simulation.grid import FILE, Grid, GridRow, read_grid
from benchmarks.simulation.live import drive
from benchmarks.simulation.policies import OURS
from benchmarks.simulation.run import Outcome, Simulation
from benchmarks.simulation.scoring import Score, mean_interval, score_outcomes
from benchmarks.simulation.workload import SimulatedRequest, workload

MODEL = "smollm2-135m"
GOODPUT_BAR, QUANTILE_BAR = 0.07, 0.12
"""How far the simulator may be from reality, relative."""


def live_grid(device: str, coefficients: Coefficients | None = None) -> Grid:
    """The rows to compare, with capacities from the coefficients."""
    grid = read_grid(FILE.with_name("live_cpu.toml" if device == "cpu" else "live_gpu.toml"))
    known = dict(capacities(grid, coefficients or read(grid.coefficients)))
    rows = [msgspec.structs.replace(row, capacity=known[row.name]) for row in grid.rows]
    return msgspec.structs.replace(grid, rows=rows)


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
    bar: float

    @property
    def difference(self) -> float:
        """Of the simulator, relative to reality."""
        return self.simulated[0] / self.real[0] - 1 if self.real[0] else 0.0

    def text(self) -> str:
        (real, half), (simulated, _) = self.real, self.simulated
        verdict = "within" if abs(self.difference) <= self.bar else "BEYOND"
        return (
            f"| {self.row} | {self.load} | {self.figure} | {real:.4g} ± {half:.2g} | {simulated:.4g} "
            f"| {self.difference:+.1%} | {verdict} {self.bar:.0%} |"
        )


def lines(row: str, load: float, pairs: Sequence[tuple[Score, Score]], tail: str) -> list[Line]:
    """``tail`` is the quantile to compare: p90 or p99."""
    figures = {"goodput": GOODPUT_BAR, "refused": 1.0, f"ttft_{tail}": QUANTILE_BAR, f"tpot_{tail}": QUANTILE_BAR}
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


def check_all(check: Check, grid: Grid, tail: str) -> list[Line]:
    check.warm()
    print("| row | load | figure | real | simulated | difference | bar |\n|---|---|---|---|---|---|---|")
    found = []
    for row in grid.rows:
        for load in grid.loads:
            pairs = [check.compare(row, load, seed) for seed in grid.seeds]
            of_cell = lines(row.name, load, pairs, tail)
            print("\n".join(line.text() for line in of_cell), flush=True)
            found += of_cell
    return found


def serve_command(arguments: argparse.Namespace, folder: Path, port: int) -> list[str]:
    common = ["--port", str(port), "--served-model-name", "m", "--device", arguments.device]
    if arguments.device == "cpu":
        # The model has a core to itself; API process and clients share another one.
        return slimserve("serve", MODEL, *common, "--max-model-len", "2048", "--threads", "1")
    model = config_folder(folder, arguments.config)
    return slimserve("serve", str(model), *common, "--max-model-len", "16384", "--random-weights", "0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--config", choices=list(CONFIGS), default="r1-1.5b", help="shapes on a GPU, random weights")
    parser.add_argument("--rows", nargs="+", metavar="NAME")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--clients", type=int, help="client processes; default: one on two cores, at most six")
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    grid = live_grid(arguments.device)
    rows = [row for row in grid.rows if not arguments.rows or row.name in arguments.rows]
    grid = msgspec.structs.replace(grid, rows=rows, seeds=grid.seeds[: arguments.repeats])
    coefficients = read(grid.coefficients)
    vocabulary = 49_152 if on_cpu else int(str(CONFIGS[arguments.config]["vocab_size"]))
    facts = report.print_header(f"Simulator against reality: {coefficients.model}, step times {coefficients.origin}")
    facts["device"] = "cpu" if on_cpu else report.device_name()
    port = free_port()
    clients = arguments.clients or max(1, min(6, len(os.sched_getaffinity(0)) // 2))
    with tempfile.TemporaryDirectory() as folder:
        command = serve_command(arguments, Path(folder), port)
        log = Path(folder) / "log"
        with running("slimserve", command, port, "/health/ready", log=log) as server:
            check = Check(grid, coefficients, server.url, clients, vocabulary)
            found = check_all(check, grid, "p90" if on_cpu else "p99")
    result = {"machine": facts, "grid": json.loads(msgspec.json.encode(grid)), "lines": msgspec.to_builtins(found)}
    print(f"written to {report.write(f'live_check_{arguments.device}', result).relative_to(report.ROOT)}")


if __name__ == "__main__":
    main()
