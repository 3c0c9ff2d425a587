"""Steps of the generation engine on a GPU, without a server: where the time of prefill and decode goes.

    python -m benchmarks.gpu_generation --config r1-1.5b --rows 64 [--profile]

Random weights, fresh random prompts, one prefill step for as many prompts as fit and then decode steps, two in
flight as the worker keeps them. For each way to draw it prints milliseconds a decode step on the host's clock and on
the device's, and output tokens/s without prefill; ``--profile`` adds torch.profiler's table of some decode steps.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.random_weights import CONFIGS
from engines.generation.loading import Loaded, load
from engines.generation.runner import LaunchedStep
from engines.protocol import Admit, EngineSpec, Row, SamplingParams, StepPlan

DRAWS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0},
    "plain": {"temperature": 0.6},
    "top_p": {"temperature": 0.6, "top_p": 0.95},
}
WARM_STEPS = 4
PROFILED_STEPS = 3


class Rows:
    """Sequences of one length that all decode together; each owns its blocks from the start."""

    def __init__(self, loaded: Loaded, prompts: Sequence[list[int]], sampling: dict[str, float], output: int) -> None:
        self._runner = loaded.runner
        self._capacity = loaded.capacity
        self._prompts = prompts
        self._sampling = sampling
        self._blocks = -(-(len(prompts[0]) + output) // loaded.capacity.block_size)
        self._length = len(prompts[0])
        self._step = 0

    def prefill(self) -> list[LaunchedStep]:
        """One step for each group of prompts that fills a step."""
        group = max(1, self._capacity.max_step_tokens // self._length)
        return [
            self._launch(range(first, min(first + group, len(self._prompts))), 0, self._length, admit=True)
            for first in range(0, len(self._prompts), group)
        ]

    def decode(self) -> LaunchedStep:
        self._length += 1
        return self._launch(range(len(self._prompts)), self._length - 1, 1, admit=False)

    def _launch(self, numbers: range, start: int, count: int, admit: bool) -> LaunchedStep:
        admits = tuple(
            Admit(
                item=number,
                slot=number,
                tokens=self._prompts[number],
                prompt_length=len(self._prompts[number]),
                blocks=tuple(range(number * self._blocks, (number + 1) * self._blocks)),
                sampling=SamplingParams(seed=number, **self._sampling),  # type: ignore[arg-type]
            )
            for number in numbers
            if admit
        )
        rows = tuple(Row(item=n, slot=n, start=start, count=count, new_blocks=(), max_new=1) for n in numbers)
        self._step += 1
        return self._runner.run(StepPlan(step=self._step, engine="", admits=admits, rows=rows))


def measure(rows: Rows, steps: int) -> dict[str, float]:
    """Milliseconds; the host's clock runs over all decode steps."""
    started = time.perf_counter()
    for step in rows.prefill():
        step.result()
    prefill = time.perf_counter() - started
    for _ in range(WARM_STEPS):
        rows.decode().result()
    in_flight: deque[LaunchedStep] = deque()
    device = []
    started = time.perf_counter()
    for _ in range(steps):
        in_flight.append(rows.decode())
        if len(in_flight) == 2:
            device.append(in_flight.popleft().result().seconds)
    device += [step.result().seconds for step in in_flight]
    wall = time.perf_counter() - started
    return {
        "prefill_ms": prefill * 1000,
        "step_ms": wall * 1000 / steps,
        "device_ms_p50": statistics.median(device) * 1000,
    }


def profile(rows: Rows) -> str:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            rows.decode().result()
    averages = profiler.key_averages()
    on_device = averages.table(sort_by="self_device_time_total", row_limit=22, max_name_column_width=60)
    on_host = averages.table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=60)
    return f"{on_device}\n{on_host}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(CONFIGS), default="r1-1.5b")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--draws", nargs="+", choices=list(DRAWS), default=list(DRAWS))
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    print(f"# GPU steps: {arguments.config}, {arguments.rows} rows, {arguments.prompt_tokens} tokens of prompt")
    print(f"  {torch.cuda.get_device_name()}, torch {torch.__version__}, commit {report.commit()}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIGS[arguments.config]))
        spec = EngineSpec(
            name="random", source=folder, device="cuda", random_weights=0, max_batch=arguments.rows, max_model_len=4096
        )
        loaded = load(spec, lambda progress: None, time.perf_counter)
    info, capacity = loaded.info, loaded.capacity
    print(
        f"  loaded in {info.load_seconds:.1f} s: {info.dtype}, weights {info.weight_bytes / 1e9:.2f} GB, "
        f"KV {info.kv_bytes / 1e9:.2f} GB in {capacity.blocks} blocks, steps of {capacity.max_step_tokens} tokens"
    )
    rng = random.Random()
    vocab = int(str(CONFIGS[arguments.config]["vocab_size"]))
    for name in arguments.draws:
        prompts = [[rng.randrange(vocab) for _ in range(arguments.prompt_tokens)] for _ in range(arguments.rows)]
        output = arguments.steps + WARM_STEPS + PROFILED_STEPS + 1
        rows = Rows(loaded, prompts, DRAWS[name], output)
        times = measure(rows, arguments.steps)
        rate = arguments.rows / times["step_ms"] * 1000
        print(f"{name:7}" + "".join(f"  {key} {value:8.2f}" for key, value in times.items()) + f"  {rate:9,.0f} tok/s")
        if arguments.profile:
            print(profile(rows), flush=True)


if __name__ == "__main__":
    main()
