"""What a run found, by kind of request, and the limits that it must keep."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("chat", "completion", "whole")
"""Streamed chats, streamed completions, completions asked for in one piece."""
ALL = "all"
TIMES = ("ttft", "tpot", "total")

PERCENTILE = re.compile(rf"({'|'.join(TIMES)})_p(\d\d)_ms")
LEAST = ("requests", "tokens_per_second")
MOST = ("failures_share", "refusals_share")


class WrongLimits(Exception):
    """The text says where."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one kind of request. ``times`` counts milliseconds of each of TIMES, as locust rounds them: to 1 ms below
    100 ms, above that to two digits."""

    complete: int = 0
    failed: int = 0
    refused: int = 0
    left: int = 0
    tokens: int = 0
    seconds: float = 0.0
    times: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        return self.complete + self.failed + self.refused + self.left

    def share(self, count: int) -> float:
        return count / self.requests if self.requests else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def percentile(self, time: str, percent: int) -> int | None:
        """Nearest rank. None where nothing was measured."""
        counts = self.times.get(time, {})
        rank = -(-percent * sum(counts.values()) // 100)
        for value, count in sorted(counts.items()):
            rank -= count
            if rank <= 0:
                return value
        return None

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("complete", "failed", "refused", "left", "tokens", "seconds")}
        times = {time: {str(value): count for value, count in counts.items()} for time, counts in self.times.items()}
        return plain | {"times": times}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Figures:
        times = {time: {int(value): count for value, count in counts.items()} for time, counts in data["times"].items()}
        return cls(**dict(data) | {"times": times})


def together(figures: Iterable[Figures]) -> Figures:
    """Of all kinds, over the same time."""
    parts = list(figures)
    times = {time: dict(sum((Counter(part.times.get(time, {})) for part in parts), Counter())) for time in TIMES}
    return Figures(
        complete=sum(part.complete for part in parts),
        failed=sum(part.failed for part in parts),
        refused=sum(part.refused for part in parts),
        left=sum(part.left for part in parts),
        tokens=sum(part.tokens for part in parts),
        seconds=max((part.seconds for part in parts), default=0.0),
        times=times,
    )


@dataclass(frozen=True, slots=True)
class Limit:
    kind: str
    name: str
    bound: float

    @property
    def least(self) -> bool:
        """Else the bound is the most."""
        return self.name in LEAST

    def found(self, figures: Figures) -> float | None:
        """None where nothing was measured."""
        if match := PERCENTILE.fullmatch(self.name):
            return figures.percentile(match[1], int(match[2]))
        if self.name == "failures_share":
            return figures.share(figures.failed)
        if self.name == "refusals_share":
            return figures.share(figures.refused)
        return figures.requests if self.name == "requests" else figures.tokens_per_second

    def kept(self, figures: Figures) -> bool:
        """What was not measured keeps no limit."""
        found = self.found(figures)
        if found is None:
            return False
        return found >= self.bound if self.least else found <= self.bound


def read_limits(file: Path) -> list[Limit]:
    """Tables by kind of request, ``all`` or one of KINDS. Raises WrongLimits, and OSError."""
    try:
        tables = tomllib.loads(file.read_text())
    except ValueError as error:
        raise WrongLimits(f"{file.name}: {error}") from None
    return [_limit(file.name, kind, name, bound) for kind, table in tables.items() for name, bound in _items(table)]


def _items(table: object) -> Iterable[tuple[str, object]]:
    return table.items() if isinstance(table, dict) else [("", table)]


def _limit(file: str, kind: str, name: str, bound: object) -> Limit:
    if kind not in (ALL, *KINDS):
        raise WrongLimits(f"{file}: [{kind}] is no kind of request: they are {', '.join((ALL, *KINDS))}")
    if not (name in LEAST + MOST or PERCENTILE.fullmatch(name)):
        known = ", ".join((*LEAST, *MOST, "ttft_p95_ms"))
        raise WrongLimits(f"{file}: {kind}.{name} is no limit: they are {known}, with ttft, tpot or total, p01 to p99")
    if isinstance(bound, bool) or not isinstance(bound, int | float) or bound < 0:
        raise WrongLimits(f"{file}: {kind}.{name} = {bound!r} is no number from 0 on")
    return Limit(kind, name, float(bound))


def limits_table(limits: Iterable[Limit], figures: Mapping[str, Figures]) -> tuple[list[str], int]:
    """Lines to print, and how many limits were missed."""
    lines, missed = [f"{'limit':28} {'wanted':>10} {'found':>10}"], 0
    for limit in limits:
        of_kind = figures.get(limit.kind, Figures())
        found, kept = limit.found(of_kind), limit.kept(of_kind)
        missed += not kept
        shown = "nothing" if found is None else f"{found:.4f}".rstrip("0").rstrip(".")
        wanted = f"{'>=' if limit.least else '<='} {limit.bound:g}"
        lines.append(f"{limit.kind + ' ' + limit.name:28} {wanted:>10} {shown:>10}  {'ok' if kept else 'MISSED'}")
    return [*lines, f"{missed} limits missed" if missed else "all limits kept"], missed


COLUMNS = ("requests", "failed", "refused", "left", "tokens/s", "ttft p50", "p95", "tpot p50", "p95", "total p95")


def summary_rows(figures: Mapping[str, Figures]) -> list[list[str]]:
    """One row a kind, in the order of COLUMNS behind its name; times in milliseconds."""
    rows = []
    for kind, each in figures.items():
        counts = [str(count) for count in (each.requests, each.failed, each.refused, each.left)]
        asked = [("ttft", 50), ("ttft", 95), ("tpot", 50), ("tpot", 95), ("total", 95)]
        times = [each.percentile(time, percent) for time, percent in asked]
        shown = ["-" if time is None else str(time) for time in times]
        rows.append([kind, *counts, f"{each.tokens_per_second:.1f}", *shown])
    return rows


def summary_table(figures: Mapping[str, Figures]) -> list[str]:
    rows = [["", *COLUMNS], *summary_rows(figures)]
    return [row[0].ljust(11) + "".join(cell.rjust(10) for cell in row[1:]) for row in rows]
