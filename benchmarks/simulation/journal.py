"""Scores of runs that are done, in a file, so that a long comparison can be stopped and gone on with, anywhere.

A run in simulated time gives the same on every machine. What it depends on is part of its key: the task, the grid, the
coefficients, whether the traces are recorded or fitted, and the code of the simulator and of what it drives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from benchmarks.report import ROOT
from benchmarks.simulation.coefficients import Coefficients
from benchmarks.simulation.grid import Grid
from benchmarks.simulation.scoring import Score
from benchmarks.simulation.traces import recorded

CODE = ("benchmarks/simulation", "server/scheduler")


class Entry(msgspec.Struct, frozen=True):
    key: str
    score: Score


def world(grid: Grid, coefficients: Coefficients) -> str:
    """A hash of everything but the task that decides a run's score."""
    digest = hashlib.sha256(msgspec.json.encode(grid) + msgspec.json.encode(coefficients))
    for name in sorted({part.lengths for row in grid.rows for part in row.parts}):
        digest.update(f"{name} {recorded(name)}".encode())
    for path in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Journal:
    """Scores by task. Lines that a kill cut short are skipped."""

    def __init__(self, path: Path, world: str) -> None:
        self._path = path
        self._world = world
        self._scores: dict[str, Score] = {}
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                entry = msgspec.json.decode(line, type=Entry)
            except msgspec.DecodeError:
                continue
            self._scores[entry.key] = entry.score

    def find(self, task: object) -> Score | None:
        """The score of a task that ran in the same world."""
        return self._scores.get(self._key(task))

    def add(self, done: Iterable[tuple[object, Score]]) -> None:
        with self._path.open("ab") as file:
            for task, score in done:
                entry = Entry(self._key(task), score)
                self._scores[entry.key] = score
                # The line break comes first: what a kill cut short cannot spoil the next line.
                file.write(b"\n" + msgspec.json.encode(entry))

    def _key(self, task: object) -> str:
        return hashlib.sha256(f"{self._world} {task!r}".encode()).hexdigest()
