"""The comparison as a picture: goodput by load, one panel a row of the grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.simulation.experiment import Comparison, Scores
from benchmarks.simulation.scoring import mean_interval
from benchmarks.simulation.tables import goodput

COLUMNS = 4


def draw(comparison: Comparison, path: Path) -> None:
    """Write an SVG; equal figures give equal bytes."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "slimserve"
    import matplotlib.pyplot as plt  # after the backend is chosen

    names = [None, *(row.name for row in comparison.grid.rows)]
    rows = -(-len(names) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(13, 2.9 * rows), sharex=True, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        _panel(axis, comparison, name)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.supxlabel("offered load over capacity")
    figure.supylabel("goodput over capacity")
    figure.tight_layout(rect=(0.01, 0, 1, 0.96))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _panel(axis: Any, comparison: Comparison, row: str | None) -> None:
    loads = comparison.grid.loads
    axis.plot(loads, [min(load, 1.0) for load in loads], color="0.8", linestyle="--", label="all of capacity")
    oracle = max(comparison.fixed, key=lambda scores: scores.mean(goodput, row=row))
    lines = [
        (comparison.uncapped, "first come first served", "tab:red"),
        (comparison.best_static, "the same, best queue cap", "tab:orange"),
        (comparison.aimd, "AIMD", "tab:purple"),
        (oracle, "best static with deadlines, in hindsight", "tab:green"),
        (comparison.ours, "adaptive", "tab:blue"),
    ]
    for scores, label, color in lines:
        _line(axis, scores, row, loads, label, color)
    axis.set_title(row or "all rows", fontsize=10)
    axis.set_ylim(0, max(loads))
    axis.grid(alpha=0.2)


def _line(axis: Any, scores: Scores, row: str | None, loads: list[float], label: str, color: str) -> None:
    points = [mean_interval(scores.by_seed(goodput, row=row, load=load)) for load in loads]
    means, halves = [mean for mean, _ in points], [half for _, half in points]
    axis.errorbar(loads, means, yerr=halves, label=label, color=color, marker="o", markersize=3, linewidth=1.4)
