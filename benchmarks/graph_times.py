"""Times of short GPU operations: inside a CUDA graph, so that the host does not count."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence

import torch

REPLAYS = 7


@functools.cache
def _stream() -> torch.cuda.Stream:
    """One for all: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def graph_microseconds(
    calls: Sequence[Callable[[], object]], replays: int = REPLAYS, warm: Callable[[], object] | None = None
) -> float:
    """Of one call, on average over all of them in a row: the median of some replays of one graph.

    The calls should use so many different weights that none is still in a cache when it comes again. ``warm`` is
    enough to run before the capture where all calls run the same kernels; by default each of them runs once.
    """
    stream = _stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for call in dict.fromkeys(calls) if warm is None else [warm]:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        graph.replay()
        times = []
        for _ in range(replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(float(begin.elapsed_time(end)))
    return 1000 * statistics.median(times) / len(calls)
