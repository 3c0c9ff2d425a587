"""Lengths and arrival times of recorded requests, or log-normal fits of them where the recordings are absent."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Literal

from benchmarks.report import ROOT

FOLDER = ROOT.parent / "shared" / "data" / "traces"

TraceName = Literal["azure-conversation", "azure-code", "mooncake-conversation"]
Half = Literal["training", "scoring"]


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request of a trace. Lengths in tokens, ``time`` in seconds since the first."""

    time: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()
    """Ids of 512-token blocks of the prompt: equal ids are equal tokens after an equal prefix."""


@dataclass(frozen=True, slots=True)
class _LogNormal:
    """Of lengths: mean and deviation of the natural logarithm, and the range that occurs."""

    mean: float
    deviation: float
    least: int
    most: int

    def draw(self, randomness: random.Random) -> int:
        return min(max(round(math.exp(randomness.gauss(self.mean, self.deviation))), self.least), self.most)


@dataclass(frozen=True, slots=True)
class _Fit:
    """Fitted to the recorded trace, which has ``count`` requests in ``seconds``."""

    prompt: _LogNormal
    output: _LogNormal
    count: int
    seconds: float


_FITS: dict[TraceName, _Fit] = {
    "azure-conversation": _Fit(_LogNormal(6.633, 0.985, 2, 14_050), _LogNormal(5.019, 0.859, 7, 1_000), 19_366, 3_501),
    "azure-code": _Fit(_LogNormal(6.999, 1.360, 3, 7_437), _LogNormal(2.788, 0.847, 6, 1_899), 8_819, 3_435),
    "mooncake-conversation": _Fit(
        _LogNormal(8.737, 1.199, 891, 126_195), _LogNormal(5.336, 1.358, 1, 2_000), 12_031, 3_537
    ),
}


def recorded(name: TraceName) -> bool:
    """Whether the recording itself is on this machine."""
    return _file(name).is_file()


@cache
def load(name: TraceName) -> tuple[Recorded, ...]:
    """All requests in the order of arrival: recorded ones, or drawn from the fit (Poisson arrivals, always equal)."""
    if not recorded(name):
        return _drawn(_FITS[name])
    reader: Callable[[Path], list[Recorded]] = _read_mooncake if name.startswith("mooncake") else _read_azure
    return tuple(sorted(reader(_file(name)), key=lambda request: request.time))


@cache
def half(name: TraceName, which: Half, scale: float = 1.0) -> tuple[Recorded, ...]:
    """The earlier half of the requests is for choosing a policy's settings, the later one for scoring.

    ``scale`` shortens prompts and outputs, for machines that are too slow for the real ones; shared blocks are lost.
    """
    trace = load(name)
    middle = len(trace) // 2
    chosen = trace[:middle] if which == "training" else trace[middle:]
    if scale == 1.0:
        return chosen
    return tuple(
        Recorded(each.time, max(1, round(each.prompt * scale)), max(1, round(each.output * scale))) for each in chosen
    )


def _file(name: TraceName) -> Path:
    if name.startswith("azure-"):
        return FOLDER / f"azure-2023-{name.removeprefix('azure-')}.csv"
    return FOLDER / f"{name}.jsonl"


def _read_azure(path: Path) -> list[Recorded]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # Seven digits of a second, one more than datetime reads.
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    return [
        Recorded(time - times[0], int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for row, time in zip(rows, times, strict=True)
    ]


def _read_mooncake(path: Path) -> list[Recorded]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        Recorded(row["timestamp"] / 1000, row["input_length"], row["output_length"], tuple(row["hash_ids"]))
        for row in rows
    ]


def _drawn(fit: _Fit) -> tuple[Recorded, ...]:
    randomness = random.Random(0)
    time = 0.0
    requests = []
    for _ in range(fit.count):
        time += randomness.expovariate(fit.count / fit.seconds)
        requests.append(Recorded(time, fit.prompt.draw(randomness), fit.output.draw(randomness)))
    return tuple(requests)
