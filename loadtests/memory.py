"""What the processes of a server hold, over time."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

MIB = 1 << 20
HALF_WINDOW = 15.0
"""Seconds on each side of a moment whose samples' median is the memory at that moment."""


def resident(pid: int) -> int:
    """Bytes of a process and all below it (RSS; pages that they share count for each)."""
    found = 0
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in family:
        try:
            found += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return found


@dataclass(slots=True)
class MemoryLog:
    """Samples as (seconds since the load began, bytes)."""

    samples: list[tuple[float, int]] = field(default_factory=list)

    def at(self, moment: float) -> float:
        """Bytes. Raises ValueError where no sample is near."""
        near = [held for when, held in self.samples if abs(when - moment) <= HALF_WINDOW]
        if not near:
            raise ValueError(f"no sample of memory near second {moment:g}")
        return statistics.median(near)

    def growth(self, begin: float, end: float) -> float:
        """Relative, from one moment to the other."""
        return self.at(end) / self.at(begin) - 1


class Sampler:
    """Takes a sample each second, in a thread, while it is entered."""

    def __init__(
        self, pid: int, clock: Callable[[], float] = time.monotonic, read: Callable[[int], int] = resident
    ) -> None:
        self.log = MemoryLog()
        self._pid, self._clock, self._read = pid, clock, read
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._began = clock()

    def sample(self) -> None:
        self.log.samples.append((self._clock() - self._began, self._read(self._pid)))

    def _watch(self) -> None:
        while not self._over.wait(1):
            self.sample()

    def __enter__(self) -> MemoryLog:
        self._began = self._clock()
        self._thread.start()
        return self.log

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
