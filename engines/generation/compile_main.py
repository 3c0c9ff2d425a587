"""The process that compiles a model's kernels while its weights are read.

    python -m engines.generation.compile_main < ORDER

Standard input brings an ``Order`` as one line of JSON and then stays open: its end means that nobody waits any more.
Standard output tells which stages are done and at the end how it went. Needs no GPU: the order says what for.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import torch

from engines.generation.compile_ahead import STAGES, AllDone, Order, Stage, StageDone
from engines.generation.rehearsal import rehearse
from engines.gpu_start import hash_triton
from engines.kernels.cuda.binary_cache import BinaryCache, remove_stale
from engines.kernels.cuda.compile_pool import Compiled, CompilePool, compile_for


def main() -> None:
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    began = time.perf_counter()
    # The threads of a pool would be missing in the processes that are forked off.
    torch.set_num_threads(1)
    # Once, before there are several processes.
    hashing = threading.Thread(target=hash_triton)
    hashing.start()
    compile_for(order.engine.machine.capability)
    stages = rehearse(order.engine)
    hashing.join()
    wanted = [one for stage in STAGES for one in stages[stage]]
    pool = CompilePool(wanted, order.processes)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    results = _tell_stages(pool.results(), {stage: len(found) for stage, found in stages.items()})
    failures = tuple(f"{wanted[each.index].name}: {each.error}" for each in results if each.error)
    _tell(AllDone(len(results), round(time.perf_counter() - began, 2), failures))
    cache = BinaryCache(Path(order.folder))
    if len(results) == len(wanted) and not failures:
        cache.remember(order.needs, {each.entry for each in results})
    cache.trim()
    remove_stale()


def _end_with_parent() -> None:
    """Wait for the end of standard input, then end this process and those that it has forked."""
    while os.read(sys.stdin.fileno(), 64):
        pass
    os.killpg(0, signal.SIGKILL)


def _tell_stages(results: Iterable[Compiled], sizes: dict[Stage, int]) -> list[Compiled]:
    """Collect all results, and say when the last one of a stage is there."""
    of_index = [stage for stage in STAGES for _ in range(sizes[stage])]
    missing = dict(sizes)
    ahead = list(STAGES)
    collected = []
    for result in results:
        collected.append(result)
        missing[of_index[result.index]] -= 1
        while ahead and not missing[ahead[0]]:
            _tell(StageDone(ahead.pop(0)))
    return collected


def _tell(message: StageDone | AllDone) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
