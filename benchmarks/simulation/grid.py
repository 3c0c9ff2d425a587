"""The plain data file that says what is simulated, as checked structs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from benchmarks.simulation.arrivals import Process
from benchmarks.simulation.traces import TraceName
from server.worker.wire import Priority

FILE = Path(__file__).with_name("grid.toml")


class Targets(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds."""

    ttft: float
    tpot: float
    ttft_per_token: float = 0.0
    """Of the prompt: a long one may take longer."""

    def first_token(self, prompt: int) -> float:
        return max(self.ttft, prompt * self.ttft_per_token)


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Requests of one kind in a row."""

    lengths: TraceName
    targets: str
    share: float = 1.0
    """Of the row's requests."""
    priority: Priority = "normal"
    tenant: str = ""


class GridRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    arrivals: Process | Literal["trace"]
    capacity: float
    """Requests a second."""
    seconds: float | None = None
    """Of arrivals, where it is not the grid's."""
    length_scale: float = 1.0
    """Prompts and outputs are this much of those recorded."""
    parts: list[Part]


class Grid(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Raises ValueError where a row names targets that are not there, or its shares do not add up to 1."""

    coefficients: str
    loads: list[float]
    seeds: list[int]
    seconds: float
    training_loads: list[float]
    training_seconds: float
    max_output: int
    static_budgets: list[int]
    queue_caps: list[int]
    targets: dict[str, Targets]
    rows: list[GridRow]

    def __post_init__(self) -> None:
        for row in self.rows:
            if missing := {part.targets for part in row.parts} - self.targets.keys():
                raise ValueError(f"row {row.name}: no targets are named {', '.join(sorted(missing))}")
            if abs(sum(part.share for part in row.parts) - 1) > 1e-9:
                raise ValueError(f"row {row.name}: the shares do not add up to 1")
            if row.arrivals == "trace" and len(row.parts) > 1:
                raise ValueError(f"row {row.name}: recorded arrivals are of one trace")


def read_grid(path: Path = FILE) -> Grid:
    """Raises msgspec.ValidationError for a file that is not a grid."""
    return msgspec.toml.decode(path.read_bytes(), type=Grid)


def write_capacities(rates: Mapping[str, float], path: Path = FILE) -> None:
    """Set the capacities of the rows of a grid file to these requests a second; all else stays as it is.

    Raises ValueError for a row that the file does not have.
    """
    text = path.read_text()
    for name, rate in rates.items():
        text, found = re.subn(
            rf'(\[\[rows\]\]\nname = "{re.escape(name)}"\n(?:(?!\[\[rows\]\]).*\n)*?capacity = )[\d.]+',
            rf"\g<1>{rate:.2f}",
            text,
        )
        if found != 1:
            raise ValueError(f"{path.name} has {found} rows named {name}")
    path.write_text(text)
