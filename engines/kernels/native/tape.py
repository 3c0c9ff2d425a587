"""Recorded calls of the native library: what a step of so many rows does, run again in one call.

A small model's step is some hundred native calls, and each of them costs Python several microseconds and the threads a
start and an end. A tape keeps their arguments, addresses among them. So the memory behind those has to stay, and what
changes from step to step has to be written to where it was at the recording.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = frozenset(
    {
        "empty",
        "view",
        "_unsafe_view",
        "split_with_sizes",
        "split",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "transpose",
        "t",
    }
)
"""Operations of torch that compute nothing: they may stand between recorded calls."""


class Arena:
    """Memory of the results of recorded calls: a piece whose tensors are gone is given to a later call."""

    def __init__(self, most_rows: int) -> None:
        """``most_rows``: of any tape. All have pieces of this size, so that tapes share them."""
        self._most_rows = most_rows
        self._free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of (rows, ...)."""
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        size, free = row_bytes * max(self._most_rows, shape[0]), self._free[row_bytes]
        chunk = free.pop() if free else torch.empty(size, dtype=torch.uint8)
        if chunk.nbytes < size:
            chunk = torch.empty(size, dtype=torch.uint8)
        memory = (ctypes.c_char * size).from_address(chunk.data_ptr())
        # torch drops ``memory`` with the last tensor that lies in it.
        weakref.finalize(memory, free.append, chunk)
        return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(*shape)


class Tape:
    """The calls of one recording. Runs in the thread that recorded it."""

    def __init__(self, library: ctypes.CDLL, threads: int, arena: Arena) -> None:
        """Starts to record; ``threads`` are the most that it will run on."""
        self.threads = threads
        self.arena = arena
        self.complete = False
        """Whether the recording has ended, with all on the tape."""
        self._kept: dict[int, torch.Tensor] = {}
        self._library = library
        self._address: int | None = library.slim_tape_begin(threads)
        if not self._address:
            raise MemoryError("no memory for a tape")
        weakref.finalize(self, library.slim_tape_free, self._address)

    def keep(self, tensor: torch.Tensor) -> None:
        """Recorded calls have its address."""
        self._kept[id(tensor)] = tensor

    def end(self) -> None:
        """Stop recording."""
        self.complete = self._library.slim_tape_end() > 0

    def run(self) -> None:
        """Do again what was recorded, on the present number of torch's threads."""
        self._library.slim_tape_run(self._address, torch.get_num_threads())


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether torch computes anything meanwhile, which no tape would repeat."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.foreign: str | None = None
        """The first operation that it saw."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would import all of torch._dynamo, more than a second, at the first operation that is watched.
        return False

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ not in VIEWS:
            self.foreign = self.foreign or str(func)
        return func(*args, **kwargs or {})
