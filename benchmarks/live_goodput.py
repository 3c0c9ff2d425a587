"""Goodput of the real server past its capacity, beside first come, first served with the best of some queue caps.

    python -m benchmarks.live_goodput                                        SmolLM2 on the CPU, a quarter of an hour
    python -m benchmarks.live_goodput --loads 1.0 1.5 --queues 16            the same in four minutes
    python -m benchmarks.live_goodput --device cuda --config r1-1.5b --queues 32 64 128

All rows of the live check come at once, and a request counts where it met its own TTFT and TPOT as its client saw them;
a refused one is a miss. First come, first served is ``policy: static`` with ``max_queue``, whose clients tell no
targets: neither the door nor the scheduler may use what that policy does not know.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from benchmarks import report
from benchmarks.live_traffic import live_grid, mixed_traffic, served_model, vocabulary
from benchmarks.model_configs import CONFIGS
from benchmarks.simulation.grid import Grid
from benchmarks.simulation.live import drive
from benchmarks.simulation.scoring import score_outcomes

RATIO_BAR = 1.2
"""Over the best first come, first served, mean over the loads."""
KEPT_BAR = 0.9
"""Goodput at the highest load over the highest goodput."""
ADMITTED_BAR = 0.99
"""Of the requests that were let in, those that met TTFT and TPOT."""
WARM_UP = 15.0
"""Seconds of traffic before anything counts: step times are learnt."""


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    settings: Mapping[str, object] = field(default_factory=dict)
    """Of the server."""
    aims: bool = True
    """Its clients tell their targets."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One contender at one load."""

    load: float
    goodput: float
    """Over capacity."""
    refused: float
    admitted_met: float


def first_come(queue: int) -> Contender:
    return Contender(f"static, queue of {queue}", {"policy": "static", "max_queue": queue}, aims=False)


def run(contender: Contender, grid: Grid, arguments: argparse.Namespace) -> list[Cell]:
    """Its goodput at each load, on one server."""
    token_ids = vocabulary(arguments.device, arguments.config)
    nonce = int.from_bytes(os.urandom(2), "big")
    cells = []
    with served_model(arguments.device, arguments.config, **contender.settings) as server:
        for number, load in enumerate([arguments.loads[0], *arguments.loads]):
            requests = mixed_traffic(grid, load, arguments.seconds if number else WARM_UP, seed=arguments.seed + number)
            outcomes = drive(
                server.url,
                "m",
                token_ids,
                requests,
                processes=arguments.clients,
                nonce=nonce + number,
                aims=contender.aims,
            )
            if number:
                score = score_outcomes(outcomes, load)
                cells.append(Cell(load, score.goodput, score.refused, score.admitted_met))
                print(
                    f"| {contender.name} | {load} | {score.goodput:.3f} | {score.refused:.1%} "
                    f"| {score.admitted_met:.1%} |",
                    flush=True,
                )
    return cells


def mean_goodput(cells: Sequence[Cell]) -> float:
    return statistics.fmean(cell.goodput for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--config", choices=list(CONFIGS), default="r1-1.5b", help="shapes on a GPU, random weights")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.8, 1.0, 1.2, 1.5], help="over capacity")
    parser.add_argument("--queues", type=int, nargs="+", default=[8, 16, 32], help="caps to choose the best of")
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals at each load")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=max(1, min(6, len(os.sched_getaffinity(0)) // 2)))
    arguments = parser.parse_args()
    facts = report.print_header("Goodput of the real server")
    facts["device"] = "cpu" if arguments.device == "cpu" else report.device_name()
    grid = live_grid(arguments.device)
    print("| policy | load | goodput | refused | admitted that met all |\n|---|---|---|---|---|")
    ours = run(Contender("adaptive"), grid, arguments)
    statics = {each.name: run(each, grid, arguments) for each in map(first_come, arguments.queues)}
    best = max(statics, key=lambda name: mean_goodput(statics[name]))
    last = max(ours, key=lambda cell: cell.load)
    figures = [
        (
            f"goodput over the best first come, first served ({best})",
            mean_goodput(ours) / mean_goodput(statics[best]),
            RATIO_BAR,
        ),
        (
            f"goodput at {last.load} of capacity over its peak",
            last.goodput / max(cell.goodput for cell in ours),
            KEPT_BAR,
        ),
        ("admitted requests that met TTFT and TPOT", min(cell.admitted_met for cell in ours), ADMITTED_BAR),
    ]
    for name, figure, bar in figures:
        print(f"{name}: {figure:.3f}, bar {bar}; ratio {figure / bar:.2f}")
    result = {"machine": facts, "load": vars(arguments), "figures": figures}
    cells = {name: [asdict(cell) for cell in found] for name, found in {"adaptive": ours, **statics}.items()}
    path = report.write(f"live_goodput_{arguments.device}", result | {"cells": cells})
    print(f"written to {path.relative_to(report.ROOT)}")
    if any(figure < bar for _, figure, bar in figures):
        raise SystemExit("the bar is missed")


if __name__ == "__main__":
    main()
