"""What a soak found, as a page and a picture."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl

from benchmarks import report
from benchmarks.simulation.traces import TraceName, recorded
from grafana.check_panels import Verdict
from loadtests.figures import COLUMNS, Figures, Limit, limits_table, summary_rows
from loadtests.memory import MIB, MemoryLog
from loadtests.run import Plan

MOST_GROWTH = 0.05
"""Of memory, relative, from minute two to the end; and so much less."""
BUSY = 2.0
"""Load average of a core from which on the page says that others used the machine."""
BUSY_TEXT = "; others used the machine meanwhile, so that times say little of the server"
TRACES: tuple[TraceName, ...] = ("azure-conversation", "azure-code")


@dataclass(slots=True)
class Soak:
    serve: str
    plan: Plan
    settled: float
    """Second from which on memory may hardly grow."""
    memory: MemoryLog
    figures: dict[str, Figures]
    limits: list[Limit]
    panels: list[Verdict] = field(default_factory=list)
    panels_skipped: str = ""
    """Why, where they were not checked."""
    burst: str = ""
    """Answers by status of the burst for the panels of refusals, as JSON."""

    @property
    def growth(self) -> float:
        """Of memory, relative."""
        return self.memory.growth(self.settled, self.plan.seconds)

    @property
    def faults(self) -> list[Verdict]:
        return [verdict for verdict in self.panels if verdict.fault]

    def missed(self) -> list[str]:
        """What it did not pass, in words."""
        _, limits = limits_table(self.limits, self.figures)
        found = [f"{limits} limits"] if limits else []
        if abs(self.growth) > MOST_GROWTH:
            found.append(f"memory changed by {self.growth:+.1%}")
        return found + [f"panel {fault.panel} ({fault.query}): {fault.fault}" for fault in self.faults]


def write_report(soak: Soak, folder: Path) -> Path:
    """``soak.md`` with ``images/soak.png``. Returns the page's path."""
    picture, page = folder / "images" / "soak.png", folder / "soak.md"
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(draw(soak))
    page.write_text(render(soak))
    return page


def render(soak: Soak) -> str:
    """Markdown."""
    plan, facts = soak.plan, report.machine()
    busy = os.getloadavg()[0] > BUSY * len(os.sched_getaffinity(0))
    source = "the recordings" if all(map(recorded, TRACES)) else "log-normal fits of the recordings"
    missed = soak.missed()
    lines = [
        f"# A soak of {plan.seconds / 60:g} minutes",
        "",
        f"`python -m loadtests.soak`: **{'passed' if not missed else 'missed: ' + '; '.join(missed)}**. "
        f"What it does is in [load-testing.md](load-testing.md).",
        "",
        f"- machine: {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB; load average at the end "
        f"{facts['load_average']}; commit {facts['commit']}{BUSY_TEXT if busy else ''}",
        f"- server: `slimserve serve {soak.serve}`",
        f"- traffic: {plan.users} users at {plan.pace:g} requests/s each, lengths and gaps from {source} of two Azure "
        f"services, lengths times {plan.length_scale:g}; {plan.disconnects:.0%} of the clients leave at a random token",
        "",
        "| | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
        *("| " + " | ".join(row) + " |" for row in summary_rows(soak.figures)),
        "",
        "Times in milliseconds. *refused*: 429 or 503 with `Retry-After`; *left*: clients that closed the connection; "
        "*failed*: everything else, streams without an ending among it. *whole*: completions in one piece.",
        "",
        "```",
        *limits_table(soak.limits, soak.figures)[0],
        "```",
        "",
        f"Memory of the server's processes (RSS): {soak.memory.at(soak.settled) / MIB:.0f} MiB after "
        f"{soak.settled:g} s, {soak.memory.at(plan.seconds) / MIB:.0f} MiB at the end, {soak.growth:+.2%} "
        f"(at most {MOST_GROWTH:.0%}).",
        "",
        "![Memory over time](images/soak.png)",
        "",
        *_panels(soak),
    ]
    return "\n".join(lines) + "\n"


def _panels(soak: Soak) -> list[str]:
    if soak.panels_skipped:
        return [f"Panels were not checked: {soak.panels_skipped}."]
    lines = [
        f"Grafana's panels: {len(soak.panels)} queries of both dashboards (GPUs' apart) over a Prometheus that scraped "
        f"the server each second; {len(soak.panels) - len(soak.faults)} gave finite data."
    ]
    if soak.burst:
        lines += [
            "",
            "Queries that were empty at the end of the load, for want of refusals, were asked again after a burst of "
            f"more clients than the queue holds, which is not in the figures above; its answers by status: "
            f"`{soak.burst}`.",
        ]
    return lines + [f"- {fault.panel} ({fault.query}): {fault.fault}" for fault in soak.faults]


def draw(soak: Soak) -> bytes:
    """Memory over time, as PNG."""
    mpl.use("agg")
    import matplotlib.pyplot as plt  # after the backend is chosen

    figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    times = [when / 60 for when, _ in soak.memory.samples]
    axis.plot(times, [held / MIB for _, held in soak.memory.samples], linewidth=1)
    axis.axvline(soak.settled / 60, color="grey", linewidth=0.8, linestyle="--")
    begin = soak.memory.at(soak.settled) / MIB
    axis.axhspan(begin * (1 - MOST_GROWTH), begin * (1 + MOST_GROWTH), color="green", alpha=0.1)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("minutes")
    axis.set_ylabel("memory of the server, MiB")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()
