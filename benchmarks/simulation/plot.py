"""The comparison as a picture: goodput by load, one panel a row of the grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.simulation.experiment import Comparison, Scores
from benchmarks.simulation.scoring import mean_interval
from benchmarks.simulation.tables import goodput

COLUMNS = 4
LEAST_SEEDS = 3
"""With fewer, 95 % intervals are so wide that they hide the lines."""


def draw(comparison: Comparison, path: Path) -> None:
    """Write an SVG; equal figures give equal bytes."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "slimserve"
    import matplotlib.pyplot as plt  # after the backend is chosen

    names = [None, *(row.name for row in comparison.grid.rows)]
    rows = -(-len(names) // COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(13, 2.9 * rows), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    panels = list(axes.flat)
    for place, (axis, name) in enumerate(zip(panels, names, strict=False)):
        _panel(axis, comparison, name)
        # Numbers under the lowest panel of each column, also where the last row is not full.
        axis.tick_params(labelbottom=place + COLUMNS >= len(names))
    for axis in panels[len(names) :]:
        axis.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.supxlabel("offered load over capacity")
    figure.supylabel("goodput over capacity")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def _panel(axis: Any, comparison: Comparison, row: str | None) -> None:
    loads = comparison.grid.loads
    axis.plot(loads, [min(load, 1.0) for load in loads], color="0.6", linestyle="--", label="all of capacity")
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
    axis.set_title(row or "all rows", fontsize=11, fontweight="normal" if row else "bold")
    axis.set_xticks(loads)
    axis.set_ylim(0, 1.03 * max(loads))
    axis.grid(alpha=0.2)


def _line(axis: Any, scores: Scores, row: str | None, loads: list[float], label: str, color: str) -> None:
    by_load = [scores.by_seed(goodput, row=row, load=load) for load in loads]
    points = [mean_interval(values) for values in by_load]
    means = [mean for mean, _ in points]
    width = 2.2 if label == "adaptive" else 1.3
    axis.plot(loads, means, label=label, color=color, marker="o", markersize=3, linewidth=width)
    if min(map(len, by_load)) >= LEAST_SEEDS:
        axis.fill_between(
            loads,
            [mean - half for mean, half in points],
            [mean + half for mean, half in points],
            color=color,
            alpha=0.13,
            linewidth=0,
        )
