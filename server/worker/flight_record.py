"""What a worker has launched and not yet settled, in memory that outlives it: it tells who was there when it died.

A message could not do that: a process that is killed, or crashes inside a kernel, takes its unsent messages along.
The memory is anonymous (no file, so a full disk does not matter) and handed to the worker as a descriptor.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Sequence

from server.scheduler.core import MAX_IN_FLIGHT

_MOST_ITEMS = 4096
"""Of one step; more are not recorded, and so never blamed."""
_SLOT = 1 + _MOST_ITEMS
_BYTES = 8 * _SLOT * MAX_IN_FLIGHT


class FlightRecord:
    """One slot a step in flight: how many items, then their numbers. The worker writes, the API process reads."""

    def __init__(self, descriptor: int) -> None:
        """Map the memory behind ``descriptor``, which becomes this object's own."""
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, _BYTES)
        self._words = memoryview(self._map).cast("q")

    @classmethod
    def create(cls) -> FlightRecord:
        descriptor = os.memfd_create("slimserve-flight-record")
        os.ftruncate(descriptor, _BYTES)
        return cls(descriptor)

    def launched(self, step: int, items: Sequence[int]) -> None:
        """A step is about to be launched. Steps are numbered without gaps."""
        start = step % MAX_IN_FLIGHT * _SLOT
        count = min(len(items), _MOST_ITEMS)
        # The count is written last: whoever dies in between has an empty step, not one of other items.
        self._words[start] = 0
        self._words[start + 1 : start + 1 + count] = array("q", items[:count])
        self._words[start] = count

    def settled(self, step: int) -> None:
        """Its results are on their way to the API process."""
        self._words[step % MAX_IN_FLIGHT * _SLOT] = 0

    def items(self) -> set[int]:
        """Items of all steps that were launched and not settled."""
        found: set[int] = set()
        for start in range(0, MAX_IN_FLIGHT * _SLOT, _SLOT):
            found.update(self._words[start + 1 : start + 1 + self._words[start]])
        return found

    def close(self) -> None:
        """Idempotent."""
        if not self._map.closed:
            self._words.release()
            self._map.close()
            os.close(self.descriptor)
