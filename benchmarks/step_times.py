"""Measures how long steps take on this machine and writes the coefficients that the batching simulator runs on.

    python -m benchmarks.step_times --config r1-1.5b --output h200_r1-1.5b        (a GPU, random weights)
    python -m benchmarks.step_times --model smollm2-135m --threads 1 --output cpu_smollm2

A grid of tokens, rows and contexts goes through the real engine, two steps in flight as the worker keeps them, in a
fresh random order each round. The first step of each visit writes the rows' state and is not counted.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import report
from benchmarks.model_configs import CONFIGS, config_folder
from benchmarks.simulation import fitting
from benchmarks.simulation.coefficients import Coefficients, StepSample, StepShape, shape_of, write
from benchmarks.simulation.host import measure_host
from engines.generation.engine import GenerationEngine
from engines.protocol import Admit, Capacity, EngineSpec, Row, SamplingParams, StepPlan

REPEATS = 5
"""Counted steps of one shape in one visit."""


CAPTURE_SECONDS = 120.0


@dataclass(frozen=True)
class GridPoint:
    """Decodes at one context, and prompt tokens after ``start`` earlier ones, in one step."""

    decodes: int = 0
    context: int = 0
    chunk: int = 0
    start: int = 0
    chunk_rows: int = 1
    """Rows that the chunk's tokens are spread over."""

    def rows(self) -> list[tuple[int, int]]:
        """(start, count) of each row, decodes first."""
        prompts = [(self.start, self.chunk // self.chunk_rows)] * self.chunk_rows if self.chunk else []
        return [(self.context - 1, 1)] * self.decodes + prompts

    def fits(self, capacity: Capacity) -> bool:
        rows = self.rows()
        blocks = sum(_blocks(start + count, capacity) for start, count in rows)
        return (
            len(rows) <= capacity.max_rows
            and sum(count for _, count in rows) <= capacity.max_step_tokens
            and blocks <= capacity.blocks
            and max(start + count for start, count in rows) < capacity.max_model_len
        )


def grid() -> Iterator[GridPoint]:
    """From one token to the largest steps that engines take; what does not fit a capacity is left out."""
    for decodes in (1, 4, 16, 64, 128, 256):
        for context in (32, 512, 2048, 8192):
            yield GridPoint(decodes=decodes, context=context)
    for chunk in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        for start in (0, 1024, 8192):
            yield GridPoint(chunk=chunk, start=start)
    for chunk, chunk_rows in ((128, 8), (512, 4), (2048, 8), (8192, 16)):
        yield GridPoint(chunk=chunk, chunk_rows=chunk_rows)
    for decodes in (8, 32, 128):
        for chunk in (64, 256, 1024, 4096):
            yield GridPoint(decodes=decodes, context=512, chunk=chunk)


def _blocks(tokens: int, capacity: Capacity) -> int:
    return -(-(tokens + 1) // capacity.block_size)


@dataclass
class Measured:
    seconds: dict[GridPoint, list[float]] = field(default_factory=dict)
    shapes: dict[GridPoint, StepShape] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    """Wall time beyond the device's own from one result to the next, by visit."""

    def samples(self) -> list[StepSample]:
        return [StepSample(shape=self.shapes[point], seconds=seconds) for point, seconds in self.seconds.items()]


class Bench:
    """Runs single points of the grid on an engine."""

    def __init__(self, engine: GenerationEngine, randomness: random.Random) -> None:
        self._engine = engine
        self._capacity = engine.capacity
        self._random = randomness
        self._step = 0
        self.measured = Measured()

    def visit(self, point: GridPoint, counted: bool) -> None:
        first = self._plan(point, admit=True)
        self._engine.launch(first)
        self._engine.collect(first.step)
        launched: deque[int] = deque()
        seconds: list[float] = []
        ends: list[float] = []
        for index in range(REPEATS + 1):
            if index < REPEATS:
                launched.append(self._engine.launch(self._plan(point, admit=False)))
            if index:
                seconds.append(self._engine.collect(launched.popleft()).seconds)
                ends.append(time.perf_counter())
        if counted:
            self.measured.shapes[point] = shape_of(first)
            self.measured.seconds.setdefault(point, []).extend(seconds)
            between = ends[-1] - ends[0] - sum(seconds[1:])
            self.measured.gaps.append(max(0.0, between) / (REPEATS - 1))

    def _plan(self, point: GridPoint, admit: bool) -> StepPlan:
        self._step += 1
        rows, admits, block = [], [], 0
        for slot, (start, count) in enumerate(point.rows()):
            rows.append(Row(item=slot, slot=slot, start=start, count=count, new_blocks=(), max_new=1))
            if admit:
                blocks = _blocks(start + count, self._capacity)
                admits.append(self._admit(slot, start + count, tuple(range(block, block + blocks))))
                block += blocks
        graph_rows, graph_tokens = self._graphs(point, len(rows), sum(row.count for row in rows))
        return StepPlan(
            step=self._step,
            engine="",
            admits=tuple(admits),
            rows=tuple(rows),
            graph_rows=graph_rows,
            graph_tokens=graph_tokens,
        )

    def _graphs(self, point: GridPoint, rows: int, tokens: int) -> tuple[int, int]:
        """The captured graph that the scheduler would ask for."""
        if point.chunk:
            return 0, next((size for size in self._capacity.graph_tokens if size >= tokens), 0)
        return next((size for size in self._capacity.graph_rows if size >= rows), 0), 0

    def _admit(self, slot: int, length: int, blocks: tuple[int, ...]) -> Admit:
        tokens = [self._random.randrange(self._engine.info.vocab_size)] * length
        sampling = SamplingParams(seed=slot, temperature=0.6)
        return Admit(item=slot, slot=slot, tokens=tokens, prompt_length=length, blocks=blocks, sampling=sampling)


def measure(engine: GenerationEngine, seconds: float) -> Measured:
    """Two rounds at least, the first not counted (it compiles kernels), and more until the time is spent.

    Ctrl-C in a counted round ends the measuring with what there is.
    """
    if not engine.wait_captured(CAPTURE_SECONDS):
        print("  the engine still captures graphs: these times are those of a young server")
    randomness = random.Random()
    bench = Bench(engine, randomness)
    points = [point for point in grid() if point.fits(engine.capacity)]
    began = time.perf_counter()
    for point in points:
        bench.visit(point, counted=False)
    print(f"  first round of {len(points)} shapes in {time.perf_counter() - began:.0f} s", flush=True)
    began, rounds = time.perf_counter(), 0
    with suppress(KeyboardInterrupt):
        while rounds == 0 or time.perf_counter() - began < seconds:
            randomness.shuffle(points)
            for point in points:
                bench.visit(point, counted=True)
            rounds += 1
    print(f"  {len(points)} shapes, {rounds} rounds of {REPEATS} steps in {time.perf_counter() - began:.0f} s")
    return bench.measured


def load(arguments: argparse.Namespace, folder: str) -> GenerationEngine:
    source, weights = arguments.model, None
    if not source:
        source, weights = str(config_folder(Path(folder), arguments.config)), 0
    elif not Path(source).exists():
        # By the short name of a model that was pulled.
        found = sorted((Path.home() / ".cache/slimserve/models" / source).glob("*.gguf"))
        if not found:
            raise SystemExit(f"{source} is neither a path nor a pulled model: slimserve pull {source}")
        source = str(found[0])
    device = "cpu" if report.device_name() == "cpu" or arguments.device == "cpu" else "cuda"
    spec = EngineSpec(
        name="bench",
        source=source,
        device=device,
        random_weights=weights,
        max_model_len=arguments.max_model_len,
        threads=arguments.threads,
    )
    return GenerationEngine.load(spec, lambda progress: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(CONFIGS), default="r1-1.5b", help="shapes, with random weights")
    parser.add_argument("--model", default="", help="a real model instead")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--threads", type=int, help="of the CPU; default: chosen as the server does")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", required=True, help="name under benchmarks/simulation/coefficients")
    arguments = parser.parse_args()
    facts = report.print_header(f"Step times: {arguments.model or arguments.config}")
    with tempfile.TemporaryDirectory() as folder:
        engine = load(arguments, folder)
        facts["device"] = report.device_name() if engine.info.device != "cpu" else "cpu"
        facts["threads"] = engine.info.threads
        print(f"  device: {facts['device']}, {engine.info.dtype}, loaded in {engine.info.load_seconds:.1f} s")
        print(f"  threads: {engine.info.threads}")
        gc.collect()
        measured = measure(engine, arguments.seconds)
        capacity, dtype = engine.capacity, engine.info.dtype
        engine.close()
    samples = measured.samples()
    costs = fitting.fit(samples)
    coefficients = Coefficients(
        model=f"{Path(arguments.model).stem or arguments.config} {dtype}",
        origin="measured",
        note="python -m benchmarks.step_times",
        machine=facts,
        capacity=capacity,
        costs=costs,
        host=measure_host(),
        gap=statistics.median(measured.gaps),
        deviations=fitting.deviations(samples),
        residuals=fitting.residuals(costs, samples),
        errors=fitting.error_summary(costs, samples),
        samples=samples,
    )
    for sample in samples:
        known, fitted = statistics.median(sample.seconds), costs.seconds(sample.shape)
        shape = sample.shape
        print(
            f"  rows {shape.rows:4}  tokens {shape.tokens:5}  pairs {shape.decode_pairs + shape.prompt_pairs:12,.0f}"
            f"  {known * 1000:9.3f} ms, fitted {fitted * 1000:9.3f} ({fitted / known - 1:+.1%})"
        )
    print(f"fitted: {costs}, {coefficients.host}, gap {coefficients.gap * 1000:.3f} ms")
    print(f"relative error p50 {coefficients.errors['p50']:.1%}, p95 {coefficients.errors['p95']:.1%}")
    print(f"written to {write(arguments.output, coefficients).relative_to(report.ROOT)}")


if __name__ == "__main__":
    main()
