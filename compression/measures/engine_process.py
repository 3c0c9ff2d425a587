"""Answers and speeds of one model's engine, taken in a process of its own: its peak memory is then this model's alone.

    python -P -m compression.measures.engine_process  < REQUEST

Request, progress and result are JSON, a line each; the last line is the result.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np
import torch

from compression.measures.energy import EnergyCounter
from compression.measures.engine_runs import EngineRuns
from compression.progress import PartReport
from engines.generation.engine import GenerationEngine
from engines.protocol import EngineLoadError, EngineSpec, SamplingParams

ROWS = {"cpu": (1, 8, 32), "cuda": (1, 8, 64)}
"""Sequences at once of the three speeds, by device kind."""
PROMPT, OUTPUT = 128, 128
"""Tokens of each sequence whose speed is measured; of models with a shorter context, half of that each."""
WARM_UP = 8
"""Tokens of each sequence before."""
FEWEST_INTERVALS = 300
"""Between tokens, so that three of them lie beyond the 99th percentile."""
CAPTURE_PATIENCE = 600.0
"""Seconds to wait for CUDA graphs."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    spec: EngineSpec
    prompts: list[list[int]] = []
    """To be answered."""
    temperature: float = 0.0
    """0: the answers are greedy."""
    seed: int = 0
    """Of the noise, where the temperature is above 0; each prompt has its own, by its number."""
    first_number: int = 0
    """Of the first prompt."""
    most: int = 0
    """Tokens of an answer."""
    ends: list[int] = []
    speed: bool = True


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Of so many sequences at once. Times in seconds."""

    rows: int
    prompt: int = PROMPT
    """Tokens of each sequence, so ``output``."""
    output: int = OUTPUT
    tokens_per_second: float
    """Output tokens over the whole time, prefill counted in."""
    first_token: float
    """Median, all prompts coming at once."""
    token_p50: float | None
    """Between two tokens of a sequence; so is ``token_p99``. None where no sequence has two."""
    token_p99: float | None
    joules_per_token: float | None = None
    """Of the whole device; None where no counter can be read."""


class Result(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    device: str
    dtype: str
    threads: int
    weight_bytes: int
    """In memory."""
    peak_bytes: int
    """Since the weights are loaded: on the CPU all memory of the process, on a GPU what torch took of it, each with the
    KV cache of the measured rows."""
    load_seconds: float
    answers: list[list[int]]
    speeds: list[Speed]


class Progress(msgspec.Struct, frozen=True, tag=True):
    what: str
    done: int
    total: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The text of an EngineLoadError."""

    reason: str


_Line: TypeAlias = Result | Progress | Failed


def measure_engine(request: Request, report: PartReport) -> Result:
    """Run the request in a fresh process. Raises EngineLoadError; RuntimeError where the process dies."""
    command = [sys.executable, "-P", "-m", __spec__.name]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment()
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin:
            process.stdin.write(msgspec.json.encode(request).decode())
        for line in process.stdout:
            message = msgspec.json.decode(line, type=_Line)
            match message:
                case Result():
                    return message
                case Failed(reason):
                    raise EngineLoadError(reason)
                case Progress(what, done, total):
                    report(what, done, total)
    raise RuntimeError(f"the process that measures {request.spec.name} ended with status {process.returncode}")


def _environment() -> dict[str, str]:
    """``-P`` keeps the working directory off the path, so a checkout that is not installed must be on it."""
    environment = dict(os.environ)
    root = str(Path(__file__).parents[2])
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    return environment


def main() -> None:
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    # What libraries print must not come between the lines.
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(message: _Line) -> None:
        lines.write(msgspec.json.encode(message).decode() + "\n")
        lines.flush()

    try:
        say(run(request, lambda what, done, total: say(Progress(what, done, total)), time.perf_counter))
    except EngineLoadError as error:
        say(Failed(str(error)))


def run(request: Request, report: PartReport, clock: Callable[[], float]) -> Result:
    """Load the engine, let it answer, measure its speeds. Raises EngineLoadError."""
    report("loading", 0, 0)
    engine = GenerationEngine.load(request.spec, lambda progress: None, clock)
    try:
        engine.wait_captured(CAPTURE_PATIENCE)
        runs = EngineRuns(engine, clock)
        count = len(request.prompts)
        _, answers = runs.run(
            request.prompts,
            request.most,
            request.ends,
            lambda done: report("answering", done, count),
            lambda number: SamplingParams(
                seed=(request.seed << 32) + request.first_number + number, temperature=request.temperature
            ),
        )
        kind = engine.info.device.partition(":")[0]
        lengths = speed_lengths(engine.capacity.max_model_len)
        speeds = []
        for index, rows in enumerate(ROWS[kind] if request.speed and lengths else ()):
            report(f"measuring {rows} at once", index, len(ROWS[kind]))
            if lengths and rows <= runs.slots:
                speeds.append(_speed(runs, rows, lengths, engine.info.device, engine.info.vocab_size))
        return Result(
            device=engine.info.device,
            dtype=engine.info.dtype,
            threads=engine.info.threads,
            weight_bytes=engine.info.weight_bytes,
            peak_bytes=_peak_bytes(kind),
            load_seconds=engine.info.load_seconds,
            answers=answers,
            speeds=speeds,
        )
    finally:
        engine.close()


def speed_lengths(context: int) -> tuple[int, int] | None:
    """Tokens in and out of a sequence whose speed is measured; None where the context has no room for both."""
    prompt, output = min(PROMPT, context // 2), min(OUTPUT, context // 2)
    return (prompt, output) if prompt else None


def _speed(runs: EngineRuns, rows: int, lengths: tuple[int, int], device: str, vocab: int) -> Speed:
    randomness, (prompt, output) = random.Random(rows), lengths
    prompts = [[randomness.randrange(vocab) for _ in range(prompt)] for _ in range(rows)]
    runs.run(prompts, min(WARM_UP, output))
    counter = EnergyCounter(device)
    before = counter.joules()
    traces = [runs.run(prompts, output)[0]]
    # A run of one output token has nothing between tokens, however often it is repeated.
    while traces[-1].intervals and sum(len(trace.intervals) for trace in traces) < FEWEST_INTERVALS:
        traces.append(runs.run(prompts, output)[0])
    after = counter.joules()
    tokens = sum(trace.output_tokens for trace in traces)
    intervals = np.array([interval for trace in traces for interval in trace.intervals])
    return Speed(
        rows=rows,
        prompt=prompt,
        output=output,
        tokens_per_second=tokens / sum(trace.seconds for trace in traces),
        first_token=float(np.median([first for trace in traces for first in trace.first_tokens])),
        token_p50=float(np.quantile(intervals, 0.5)) if len(intervals) else None,
        token_p99=float(np.quantile(intervals, 0.99)) if len(intervals) else None,
        joules_per_token=None if before is None or after is None or after <= before else (after - before) / tokens,
    )


def _peak_bytes(kind: str) -> int:
    if kind == "cuda":
        return int(torch.cuda.max_memory_reserved())
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("the kernel does not tell this process its peak memory")


if __name__ == "__main__":
    main()
