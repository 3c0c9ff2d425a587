"""Opens ONNX Runtime sessions, and tries them before they serve: free axes, the batch axis, threads, step times."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

from engines.onnx.arrays import DTYPES, Array
from engines.onnx.checks import CheckedFile
from engines.onnx.graph import may_be_batched
from engines.protocol import EngineLoadError
from engines.tensors import BYTES, TensorSpec

TRIED_SIZES = (64, 48, 32, 128, 224, 256, 16, 8, 1)
"""For free axes beside the batch, until the graph runs with one."""
CLOSE = 0.03
"""Rows computed together may differ from rows alone by this share of the largest output: sums are ordered otherwise,
and a dynamically quantized graph takes its scales from the whole batch."""
TIMED_ROWS = (1, 4, 16)
RUNS = 5
MOST_SECONDS = 0.3
"""For the runs of one number of rows."""
WORTH = 0.85
"""More threads are taken where they need at most this share of the time of fewer: the server needs the cores too."""

Arrays = dict[str, Array]


def open_session(file: CheckedFile, threads: int) -> onnxruntime.InferenceSession:
    """On the CPU. Raises EngineLoadError, with ONNX Runtime's own words behind it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin while they wait take the cores from everything else on the machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding has no common base class
        raise EngineLoadError(f"{file.path.name} is damaged, or ONNX Runtime does not support it") from error


@dataclass(frozen=True, slots=True)
class Trial:
    """What the first runs of a graph showed."""

    batched: bool
    size: int | None
    """Of the free axes beside the batch in these runs; None where the graph ran with none of those tried."""


def try_batch(session: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Trial:
    """Whether rows that are computed together come out as each of them alone: then axis 0 is the batch."""
    free = any(size < 0 for spec in inputs for size in spec.shape[1:])
    for size in TRIED_SIZES if free else (1,):
        one = sample(inputs, 1, size)
        try:
            alone = run(session, one)
        except Exception:  # noqa: BLE001 - the graph says no to this size
            continue
        return Trial(may_be_batched(inputs, outputs) and _batches(session, one, alone), size)
    return Trial(batched=False, size=None)


def _batches(session: Any, one: Arrays, alone: Arrays) -> bool:
    other = {name: _other(name, array) for name, array in one.items()}
    try:
        other_alone = run(session, other)
        both = run(session, {name: np.concatenate([one[name], other[name]]) for name in one})
    except Exception:  # noqa: BLE001 - then it is none
        return False
    return all(_rows_match(both[name], alone[name], other_alone[name]) for name in alone)


def _rows_match(both: Array, first: Array, second: Array) -> bool:
    expected = np.concatenate([first, second])
    if both.shape != expected.shape:
        return False
    if both.dtype.kind != "f":
        return both.dtype == np.object_ or bool(np.mean(both == expected) > 1 - CLOSE)
    largest = np.nanmax(np.abs(expected), initial=0.0)
    return bool(np.allclose(both, expected, rtol=0, atol=CLOSE * largest + 1e-6, equal_nan=True))


def sample(inputs: Sequence[TensorSpec], rows: int, size: int) -> Arrays:
    """Inputs that every graph should take: small whole numbers, noise of a fixed seed, masks that hide nothing."""
    noise = np.random.default_rng(0)
    arrays: Arrays = {}
    for spec in inputs:
        shape = tuple(axis if axis >= 0 else rows if index == 0 else size for index, axis in enumerate(spec.shape))
        if spec.datatype == BYTES:
            arrays[spec.name] = np.full(shape, "a", dtype=np.object_)
        elif spec.datatype.startswith("FP"):
            arrays[spec.name] = noise.standard_normal(shape).astype(DTYPES[spec.datatype])
        else:
            arrays[spec.name] = np.ones(shape, dtype=DTYPES[spec.datatype])
    return arrays


def _other(name: str, array: Array) -> Array:
    """Another row for the same inputs: ids that differ, the same masks."""
    if array.dtype.kind == "f":
        return np.asarray(-array, dtype=array.dtype)
    return np.zeros_like(array) if array.dtype.kind in "iu" and "mask" not in name else array


def run(session: Any, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> Arrays:
    """Raises whatever ONNX Runtime raises."""
    names = [output.name for output in session.get_outputs()] if outputs is None else list(outputs)
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def time_rows(
    session: Any,
    inputs: Sequence[TensorSpec],
    size: int,
    counts: Sequence[int],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Seconds of the fastest of a few runs, by number of rows."""
    found = {}
    for rows in counts:
        arrays = sample(inputs, rows, size)
        run(session, arrays)
        began, best = clock(), float("inf")
        for _ in range(RUNS):
            start = clock()
            run(session, arrays)
            best = min(best, clock() - start)
            if clock() - began > MOST_SECONDS:
                break
        found[rows] = best
    return found


def thread_counts() -> list[int]:
    """What is worth trying on the cores that this process may use, ascending."""
    cores = len(os.sched_getaffinity(0))
    return [count for count in (1, 2, 4, 8, 16, 32, 64) if count < cores] + [cores]
