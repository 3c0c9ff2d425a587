"""Plain models on ONNX Runtime: steps of one-shot items, computed in a thread of their own."""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from engines.onnx.arrays import Array, Inputs, StepArrays, read_inputs, write_outputs
from engines.onnx.checks import CheckedFile, check_onnx
from engines.onnx.graph import padded_axes, read_specs
from engines.onnx.session import TIMED_ROWS, WORTH, Trial, open_session, run, thread_counts, time_rows, try_batch
from engines.plain_model import read_plain_model
from engines.protocol import (
    Capacity,
    EngineInfo,
    EngineLoadError,
    EngineSpec,
    LoadPhase,
    LoadProgress,
    Measured,
    OneShotRow,
    ReportProgress,
    RowResult,
    StepPlan,
    StepResult,
    StepSample,
)
from engines.tensors import Signature

MAX_ROWS = 64
"""Of a step, where nobody says otherwise."""
_LONGEST_REASON = 200
_REASON = re.compile(r"(indices element out of data bounds[^\n]*|Got invalid dimensions for input[^\n]*)")
"""What of ONNX Runtime's messages helps a client; the rest names its source files and the graph's nodes."""
log = logging.getLogger(__name__)


class OnnxEngine:
    """Implements ``TensorEngine``. One item that fails does not touch the others of its step."""

    def __init__(self, session: Any, info: EngineInfo, signature: Signature, capacity: Capacity) -> None:
        self._session = session
        self._info = info
        self._signature = signature
        self._capacity = capacity
        self._inputs: dict[int, Inputs] = {}
        self._orders: queue.SimpleQueue[tuple[StepPlan, list[Inputs]] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[StepResult | Exception] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=f"onnx-{info.name}", daemon=True).start()

    @classmethod
    def load(cls, spec: EngineSpec, report: ReportProgress) -> Self:
        """Check the file, open it, find its batch axis and the fastest number of threads. Raises EngineLoadError."""
        began = time.perf_counter()
        if spec.device != "cpu":
            raise EngineLoadError(f"{spec.name}: ONNX models run on the CPU here; serve it with --device cpu")
        report(LoadProgress(phase="verify"))
        path = Path(spec.source)
        file = check_onnx(read_plain_model(path).file)
        checked = time.perf_counter()
        report(LoadProgress(phase="read"))
        first = spec.threads or (spec.measured.threads if spec.measured else 0) or 1
        session = open_session(file, first)
        opened = time.perf_counter()
        report(LoadProgress(phase="measure"))
        signature, trial = _signature(session, spec)
        session, threads, samples = _measure(file, session, signature, trial, spec, first)
        ended = time.perf_counter()
        capacity = Capacity(
            blocks=1, block_size=1, max_rows=signature.max_rows, max_step_tokens=1, max_model_len=1, one_shot_rows=()
        )
        info = EngineInfo(
            name=spec.name,
            fingerprint=_fingerprint(file),
            device="cpu",
            dtype=_dtype(signature),
            kv_dtype="none",
            weight_bytes=file.weight_bytes,
            kv_bytes=0,
            threads=threads,
            load_seconds=ended - began,
            load_phases=(
                LoadPhase("verify", checked - began),
                LoadPhase("read", opened - checked),
                LoadPhase("measure", ended - opened),
            ),
            vocab_size=0,
            measured=Measured(
                max_rows=signature.max_rows,
                step_tokens=0,
                workspace=0,
                threads=threads,
                cores=len(os.sched_getaffinity(0)),
                profile=samples,
            ),
            signature=signature,
        )
        return cls(session, info, signature, capacity)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    def put(self, item: int, inputs: bytes) -> None:
        self._inputs[item] = read_inputs(inputs)

    def launch(self, plan: StepPlan) -> int:
        self._orders.put((plan, [self._inputs.pop(row.item) for row in plan.one_shot]))
        return plan.step

    def collect(self, ticket: int) -> StepResult:
        result = self._results.get()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """The thread ends, and with it the session goes."""
        self._orders.put(None)
        self._inputs.clear()
        self._session = None

    # --- in the engine's thread

    def _work(self) -> None:
        session = self._session
        while (order := self._orders.get()) is not None:
            plan, items = order
            began = time.perf_counter()
            try:
                rows, retried = self._step(session, plan, items)
                seconds = time.perf_counter() - began
                self._results.put(StepResult(step=plan.step, rows=rows, seconds=seconds, irregular=retried))
            except Exception as error:  # noqa: BLE001 - ``collect`` raises it
                self._results.put(error)

    def _step(self, session: Any, plan: StepPlan, items: list[Inputs]) -> tuple[list[RowResult], Any]:
        """All items together, or where that fails each alone: whoever is at fault fails alone."""
        try:
            outputs = self._run(session, items, plan.padded_rows)
        except Exception as error:  # noqa: BLE001 - whatever it is, it may be one item's fault
            if len(items) == 1:
                return [_failed(plan.one_shot[0], error)], "retry"
            alone = (self._alone(session, row, item) for row, item in zip(plan.one_shot, items, strict=True))
            return list(alone), "retry"
        return [
            RowResult(item=row.item, output=write_outputs(output, item.wanted))
            for row, item, output in zip(plan.one_shot, items, outputs, strict=True)
        ], ""

    def _alone(self, session: Any, row: OneShotRow, item: Inputs) -> RowResult:
        try:
            (output,) = self._run(session, [item], row.rows)
        except Exception as error:  # noqa: BLE001 - as above
            return _failed(row, error)
        return RowResult(item=row.item, output=write_outputs(output, item.wanted))

    def _run(self, session: Any, items: list[Inputs], rows: int) -> list[dict[str, Array]]:
        arrays = StepArrays(self._signature, [item.arrays for item in items], rows)
        names = [spec.name for spec in self._signature.outputs]
        return arrays.split(run(session, arrays.inputs, names))


def _failed(row: OneShotRow, error: Exception) -> RowResult:
    log.warning("item %d failed: %s", row.item, str(error)[:1000])
    telling = _REASON.search(str(error))
    reason = "it cannot be computed" if telling is None else telling[0]
    return RowResult(item=row.item, error=reason[:_LONGEST_REASON])


def _signature(session: Any, spec: EngineSpec) -> tuple[Signature, Trial]:
    inputs, outputs = read_specs(session.get_inputs(), "input"), read_specs(session.get_outputs(), "output")
    trial = try_batch(session, inputs, outputs)
    if trial.size is None:
        log.warning("%s: it did not run with any of the sizes tried, so requests are not batched", spec.name)
    elif not trial.batched:
        log.warning("%s: rows together do not come out as rows alone, so requests are not batched", spec.name)
    rows = (spec.max_batch or MAX_ROWS) if trial.batched else 1
    padded = padded_axes(inputs) if trial.batched else ()
    return Signature(inputs=inputs, outputs=outputs, batched=trial.batched, max_rows=rows, padded=padded), trial


def _measure(
    file: CheckedFile, session: Any, signature: Signature, trial: Trial, spec: EngineSpec, threads: int
) -> tuple[Any, int, tuple[StepSample, ...]]:
    """The session with the number of threads that serves best, that number, and what its steps took."""
    if trial.size is None:
        return session, threads, ()
    counts = [rows for rows in TIMED_ROWS if rows <= signature.max_rows]
    times = time_rows(session, signature.inputs, trial.size, counts)
    if not spec.threads and not (spec.measured and spec.measured.threads):
        for more in thread_counts()[1:]:
            wider = open_session(file, more)
            faster = time_rows(wider, signature.inputs, trial.size, counts)
            if _share(faster, times) > WORTH:
                break
            session, threads, times = wider, more, faster
    sizes = dict.fromkeys(signature.free_axes, trial.size)
    bucket = signature.bucket(sizes)
    samples = tuple(StepSample(rows=rows, bucket=bucket, seconds=seconds) for rows, seconds in times.items())
    return session, threads, samples


def _share(faster: dict[int, float], times: dict[int, float]) -> float:
    """Of the time, the mean over numbers of rows."""
    return sum(faster[rows] / times[rows] for rows in times) / len(times)


def _fingerprint(file: CheckedFile) -> str:
    """Over size and beginning: it tells models apart in the log, and is no checksum."""
    with file.path.open("rb") as opened:
        return hashlib.sha256(opened.read(1 << 20) + str(file.weight_bytes).encode()).hexdigest()


def _dtype(signature: Signature) -> str:
    floats: Sequence[str] = [spec.datatype for spec in signature.outputs if spec.datatype.startswith("FP")]
    return {"FP16": "float16", "FP64": "float64"}.get(floats[0], "float32") if floats else "integers"
