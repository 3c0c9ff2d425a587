"""The tables of ``slimserve bench serve``, and the same as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Self

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from server.bench.summary import METRICS, P99_FROM, Quantiles, Summary

_TITLES = {"ttft": "time to first token", "tpot": "time per output token", "gap": "longest gap", "e2e": "end to end"}


class RequestProgress:
    """How many requests have ended: a bar on a terminal, nothing elsewhere. Gone when the run is."""

    def __init__(self, console: Console, what: str, requests: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(what, total=requests)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, ended: int) -> None:
        self._bar.update(self._task, completed=ended)


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:,.2f}" if seconds < 0.1 else f"{seconds * 1000:,.0f}"


def show(console: Console, summaries: Sequence[Summary], slo: dict[str, float]) -> None:
    """Percentiles as medians over the seeds, then a line of rates for each seed, then what went wrong."""
    latency = Table(title=None if len(summaries) == 1 else f"median of {len(summaries)} seeds")
    for heading in ("ms", "p50", "p90", "p99"):
        latency.add_column(heading, justify="left" if heading == "ms" else "right")
    for metric in METRICS:
        middle = Quantiles.median([summary.metrics[metric] for summary in summaries])
        latency.add_row(_TITLES[metric], *map(milliseconds, (middle.p50, middle.p90, middle.p99)))
    console.print(latency)
    rates = Table()
    rates.add_column("")
    for summary in summaries:
        rates.add_column(f"seed {summary.seed}", justify="right")
    for title, cell in _RATES.items():
        rates.add_row(title, *map(cell, summaries))
    console.print(rates)
    for line in notes(summaries, slo):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


_RATES: dict[str, Callable[[Summary], str]] = {
    "requests": lambda summary: f"{summary.requests:,}",
    "complete": lambda summary: f"{summary.complete:,}",
    "refused (429, 503)": lambda summary: f"{sum(summary.refused.values()):,}",
    "failed": lambda summary: f"{sum(summary.errors.values()):,}",
    "complete requests/s": lambda summary: f"{summary.requests_per_second:,.2f}",
    "prompt tokens/s": lambda summary: f"{summary.input_tokens_per_second:,.0f}",
    "output tokens/s": lambda summary: f"{summary.output_tokens_per_second:,.0f}",
    "good requests/s": lambda summary: f"{summary.goodput:,.2f}",
    "good": lambda summary: f"{summary.good / summary.requests:.1%}",
}


def notes(summaries: Sequence[Summary], slo: dict[str, float]) -> list[str]:
    """Whatever a reader of the tables must know."""
    targets = ", ".join(f"{metric} <= {milliseconds(most)} ms" for metric, most in slo.items())
    lines = [f"good: complete, and {targets}" if targets else "good: complete (no --slo was given)"]
    if any(summary.complete < P99_FROM for summary in summaries):
        lines.append(f"p99 needs {P99_FROM} complete requests a seed; raise --requests to see it")
    if any(summary.uncounted for summary in summaries):
        lines.append("the server does not report usage: tokens are counted as events, and some may hold several")
    events = statistics.fmean(summary.tokens_per_event for summary in summaries)
    if events > 1.05:
        lines.append(f"an event holds {events:.2f} tokens on average")
    for summary in summaries:
        for kind, count in {**summary.refused, **summary.errors}.items():
            lines.append(f"seed {summary.seed}: {count} x {kind}: {summary.details[kind]}")
    lines += client_lines(summaries)
    return lines


def client_lines(summaries: Sequence[Summary]) -> list[str]:
    """One line where the client kept up, else one for each way in which it did not."""
    limits = [f"seed {summary.seed}: {limit}" for summary in summaries for limit in summary.client.limits]
    if limits:
        return ["THE CLIENT WAS THE LIMIT, so these figures are not the server's:", *limits]
    lates = [summary.client.late_p99 for summary in summaries if summary.client.late_p99 is not None]
    late = f"sends at most {milliseconds(max(lates))} ms late (p99), " if lates else ""
    lag = max(summary.client.loop_lag_p99 for summary in summaries)
    cpu = max(summary.client.cpu_share for summary in summaries)
    return [f"the client kept up: {late}event loop lag p99 {milliseconds(lag)} ms, busiest process {cpu:.0%} of a core"]


def as_json(settings: dict[str, object], summaries: Sequence[Summary]) -> bytes:
    """Seconds throughout."""
    median = {metric: Quantiles.median([summary.metrics[metric] for summary in summaries]) for metric in METRICS}
    result = {"settings": settings, "median": median, "seeds": summaries}
    return msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"
