"""Where the time of a decode step goes on a GPU: its kernels by time, and what is left between them.

    python -m benchmarks.decode_profile r1-1.5b b64           # one model; engine_speed --profile b64 does the same

Runs a column of ``engine_speed`` until it only decodes, then records some steps with torch's profiler.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.engine_columns import Bench, loaded_bench
from benchmarks.model_configs import CONFIGS
from benchmarks.workloads import WORKLOADS, Workload

WARM_STEPS = 40
"""Decode steps before the recording begins."""
STEPS = 40
NAME_WIDTH = 76


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel over all recorded steps."""

    name: str
    launches: int
    microseconds: float


class Recorder:
    """Counts settled steps and records some of them. Two steps are in flight at both ends, so counts fit to 1 in 40."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._settled = 0
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def on_step(self) -> None:
        self._settled += 1
        if self._settled == self._first:
            self._profiler.start()
        elif self._settled == self._first + STEPS:
            torch.cuda.synchronize()
            self._profiler.stop()

    def kernels(self) -> list[Kernel]:
        """Safe after the last recorded step."""
        return [
            Kernel(event.key, event.count, event.self_device_time_total)
            for event in self._profiler.key_averages()
            if event.device_type.name == "CUDA"
        ]


def table(kernels: Iterable[Kernel], steps: int, step_ms: float) -> list[str]:
    """Lines: each kernel's launches and microseconds a step and its share of the step, then what no kernel covers."""
    ranked = sorted(kernels, key=lambda kernel: kernel.microseconds, reverse=True)
    busy = sum(kernel.microseconds for kernel in ranked) / steps
    step = step_ms * 1000
    lines = [f"{'kernel':{NAME_WIDTH}}  launches        us   share"]
    for kernel in ranked:
        each = kernel.microseconds / steps
        lines.append(
            f"{kernel.name[:NAME_WIDTH]:{NAME_WIDTH}}  {kernel.launches / steps:8.1f}  {each:8.1f}  {each / step:6.1%}"
        )
    launches = sum(kernel.launches for kernel in ranked) / steps
    lines.append(f"{'all kernels':{NAME_WIDTH}}  {launches:8.1f}  {busy:8.1f}  {busy / step:6.1%}")
    lines.append(f"{'the rest of the step':{NAME_WIDTH}}  {'':8}  {step - busy:8.1f}  {1 - busy / step:6.1%}")
    return lines


def decode_steps(bench: Bench, workload: Workload) -> tuple[int, float]:
    """Steps of a run before it only decodes, and the mean milliseconds of one that does, without a profiler."""
    bench.run(workload)
    bench.wait_captured()
    run = bench.run(workload)
    before = next(index for index, step in enumerate(run.steps) if step.contexts)
    return before, statistics.fmean(step.interval for step in run.decodes if step.interval is not None) * 1000


def profile(bench: Bench, workload: Workload) -> Sequence[str]:
    before, step_ms = decode_steps(bench, workload)
    recorder = Recorder(before + WARM_STEPS)
    prompts = workload.prompts(bench.engine.info.vocab_size, random.Random())
    bench.serving.run(prompts, workload.outputs, recorder.on_step)
    return table(recorder.kernels(), STEPS, step_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(CONFIGS))
    parser.add_argument("column", choices=[name for name in WORKLOADS if name.startswith("b")])
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a profile of kernels needs a GPU")
    with loaded_bench(arguments.model, arguments.dtype, "cuda") as bench:
        print(f"\n{arguments.model} {bench.weights} {arguments.column} on {bench.device}: one decode step")
        print("\n".join(profile(bench, WORKLOADS[arguments.column])), flush=True)


if __name__ == "__main__":
    main()
