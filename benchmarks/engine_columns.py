"""One model's part of ``engine_speed``, in a process of its own so that the model has the device for itself.

    python -m benchmarks.engine_columns r1-1.5b --columns b1 b64 --output figures.json

Prints one line a column and writes all figures as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import report, vllm_figures
from benchmarks.engine_table import COLUMNS, Figures, cells
from benchmarks.floors import decode_bytes, read_bandwidth
from benchmarks.model_configs import CONFIGS, MODEL_LEN, QUANTIZED, config_folder
from benchmarks.offline import OfflineServing, Run, StepTimes
from benchmarks.workloads import WORKLOADS, Workload
from engines.generation.engine import GenerationEngine
from engines.manifest import read_manifest
from engines.models.config import ModelConfig, parse_config
from engines.protocol import EngineSpec
from server.scheduler.config import SchedulerConfig
from server.worker.main import RARE_COLLECTIONS

CAPTURE_PATIENCE = 60.0
"""Seconds that graph capture may take before timing starts."""


@dataclass(frozen=True, slots=True)
class Bench:
    """A loaded engine and what its figures are held against."""

    engine: GenerationEngine
    serving: OfflineServing
    config: ModelConfig
    weights: str
    """Format of the weights."""
    bandwidth: float
    """Bytes per second, read, measured before the engine was loaded."""

    @property
    def device(self) -> str:
        return device_name(self.engine.info.device)

    def measure(self, workload: Workload, repeats: int | None) -> Figures:
        """One warm-up run, then the runs that count, each with fresh prompts."""
        self.run(workload)
        self.wait_captured()
        runs = [self.run(workload) for _ in range(repeats or workload.repeats)]
        rates = [workload.counted_tokens / run.seconds for run in runs]
        steps = [step for run in runs for step in run.decodes]
        wall = [step.interval for step in steps if step.interval is not None]
        needed = [self.step_bytes(step) for step in steps]
        everything = [step for run in runs for step in run.steps]
        decode = statistics.fmean(wall) if wall else None
        return Figures(
            tokens_per_second=statistics.median(rates),
            slowest=min(rates),
            fastest=max(rates),
            prefill_ms=statistics.median(run.prefill for run in runs) * 1000,
            decode_ms=decode * 1000 if decode else None,
            decode_device_ms=statistics.fmean(step.device for step in steps) * 1000 if steps else None,
            floor_ms=statistics.fmean(needed) / self.bandwidth * 1000 if needed else None,
            bytes_per_second=statistics.fmean(needed) / decode if decode else None,
            plan_ms=statistics.fmean(step.plan for step in steps or everything) * 1000,
            launch_ms=statistics.fmean(step.launch for step in steps or everything) * 1000,
            settle_ms=statistics.fmean(step.settle for step in steps or everything) * 1000,
            steps=len(everything) // len(runs),
            graphed=statistics.fmean(step.graphed for step in everything),
            runs=rates,
        )

    def run(self, workload: Workload) -> Run:
        """Raises AssertionError where the engine did not compute everything itself, once for each token."""
        prompts = workload.prompts(self.engine.info.vocab_size, random.Random())
        run = self.serving.run(prompts, workload.outputs)
        assert run.output_tokens == sum(workload.outputs), f"{run.output_tokens} output tokens"
        assert run.cached_tokens == 0, f"{run.cached_tokens} prompt tokens came from the prefix cache"
        return run

    def step_bytes(self, step: StepTimes) -> float:
        info, capacity = self.engine.info, self.engine.capacity
        kv_token_bytes = info.kv_bytes / (capacity.blocks * capacity.block_size)
        return decode_bytes(self.config, self.weights, kv_token_bytes, step.contexts)

    def wait_captured(self) -> None:
        """Until no more graphs are being captured: steps are slow meanwhile. Says so where that takes too long."""
        if not self.engine.wait_captured(CAPTURE_PATIENCE):
            print(f"graphs are still being captured after {CAPTURE_PATIENCE:.0f} s", flush=True)


@contextmanager
def loaded_bench(model: str, dtype: str, device: str, prefix_cache: bool = True) -> Iterator[Bench]:
    """Measure the bandwidth, then load the model with random weights. ``device``: cpu or cuda."""
    bandwidth = read_bandwidth(torch.device(device))
    if device == "cuda":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        source = config_folder(Path(folder), model, dtype)
        config = parse_config(read_manifest(source, random_weights=True))
        spec = EngineSpec(
            name=model,
            source=str(source),
            device=device,
            dtype="bfloat16" if dtype in QUANTIZED else dtype,
            max_model_len=MODEL_LEN,
            random_weights=0,
            uniform_routing=True,
        )
        engine = GenerationEngine.load(spec, lambda progress: None)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*RARE_COLLECTIONS)
    serving = OfflineServing(engine, SchedulerConfig(prefix_cache=prefix_cache), time.perf_counter)
    try:
        yield Bench(engine, serving, config, dtype if dtype in QUANTIZED else engine.info.dtype, bandwidth)
    finally:
        engine.close()


def device_name(device: str) -> str:
    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


def measure(bench: Bench, model: str, columns: Sequence[str], repeats: int | None) -> dict[str, dict[str, Any]]:
    """All columns, each printed when it is there."""
    kind = vllm_figures.gpu_kind(bench.device)
    results: dict[str, dict[str, Any]] = {}
    print(report.row(list(COLUMNS), list(COLUMNS.values())))
    for column in columns:
        figures = bench.measure(WORKLOADS[column], repeats)
        print(report.row(cells(kind, model, bench.weights, column, figures), list(COLUMNS.values())), flush=True)
        results[column] = {"commit": report.commit(), **asdict(figures), "floor_share": figures.floor_share}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(CONFIGS))
    parser.add_argument("--columns", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--no-prefix-cache", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with loaded_bench(arguments.model, arguments.dtype, arguments.device, not arguments.no_prefix_cache) as bench:
        info, capacity = bench.engine.info, bench.engine.capacity
        print(
            f"\n{arguments.model} {bench.weights} on {bench.device}: loaded in {info.load_seconds:.1f} s, weights "
            f"{info.weight_bytes / 1e9:.2f} GB, KV {capacity.blocks * capacity.block_size:,} tokens, steps of "
            f"{capacity.max_step_tokens} tokens, read bandwidth {bench.bandwidth / 1e12:.3f} TB/s",
            flush=True,
        )
        columns = measure(bench, arguments.model, arguments.columns, arguments.repeats)
        result = {
            "device": bench.device,
            "weights": bench.weights,
            "read_bandwidth": bench.bandwidth,
            "load_seconds": info.load_seconds,
            "graph_rows": list(bench.engine.capacity.graph_rows),
            "columns": columns,
        }
    arguments.output.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
