"""Finds the configurations of the skinny linear kernel on the GPU at hand and writes the table of that GPU.

    python -m benchmarks.tune_kernels [--models r1-1.5b r1-7b v2-lite] [--candidates 16] [--install]

For each layer and number of rows: the best configurations by the model of the machine are compiled in all cores, timed
inside a CUDA graph over at least 512 MB of distinct weights, the best of them again with other prefetches, other depths
of the pipeline and without early start, checked against float32, and compared with cuBLAS and the kernels around it.
Files go to ``$OUT`` or benchmarks/results; --install also puts the table where the kernels look for it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version

import torch

from benchmarks import report
from benchmarks.floors import read_bandwidth
from benchmarks.tune_descent import describe
from benchmarks.tune_tables import merged, write_table
from benchmarks.tuned_layers import DTYPE, LAYERS, Inputs, Layer, microseconds
from engines.kernels.cuda.binary_cache import choose_folder
from engines.kernels.cuda.tuning import (
    BUCKETS,
    TABLES,
    Machine,
    SkinnyConfig,
    block_rows,
    machine_of,
    predicted_us,
    ranked,
    table_entries,
)

DEVICE = torch.device("cuda")
POOL_BYTES = 1_100_000_000
SEARCHED = (1, 8, 16, 32, 64, 128)
"""Rows at which all candidates run; the other buckets take the best of those at their neighbours."""
FINALISTS = 2
PREFETCHED = (0, 96 << 10, 256 << 10)
"""Bytes of a program's weights asked for ahead, to try beside the usual."""
TOLERANCE = 1e-2


@dataclass(slots=True)
class Found:
    """Of one layer: microseconds by rows and configuration; None stands for cuBLAS."""

    layer: Layer
    times: dict[int, dict[SkinnyConfig | None, float]] = field(default_factory=dict)
    best: dict[int, SkinnyConfig | None] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def best_us(self, rows: int) -> float:
        return self.times[rows][self.best[rows]]


def compile_one(machine: Machine, layer: Layer, rows: int, config: SkinnyConfig) -> str:
    """In a process of its own, which has no GPU; returns what went wrong."""
    try:
        from engines.kernels.cuda.compile_pool import compile_for
        from engines.kernels.cuda.skinny import Fused, compile_skinny, handed_tiles

        compile_for(machine.capability)
        hands_over = layer.hands_over and handed_tiles(rows, layer.shape.lines, config) > 0
        fused = Fused(layer.bias, layer.residual, layer.handed_parts, hands_over)
        compile_skinny(layer.shape, rows, config, machine, fused, DTYPE, layer.output_dtype)
    except Exception as error:  # noqa: BLE001 - one failure must not end the search
        return f"{config}: {type(error).__name__}: {error}"[:300]
    return ""


class Tuner:
    def __init__(self, machine: Machine, pool: torch.Tensor, compilers: ProcessPoolExecutor, count: int) -> None:
        self._machine, self._pool, self._compilers, self._count = machine, pool, compilers, count

    def compile(
        self, layer: Layer, configs: dict[int, list[SkinnyConfig]]
    ) -> dict[tuple[int, SkinnyConfig], Future[str]]:
        """By rows of the tile: start to compile each configuration."""
        wanted = {(block_rows(rows), config) for rows, found in configs.items() for config in found}
        return {
            (rows, config): self._compilers.submit(compile_one, self._machine, layer, rows, config)
            for rows, config in wanted
        }

    def first_configs(self, layer: Layer) -> dict[int, list[SkinnyConfig]]:
        """The model's candidates for the searched buckets; 1 and 8 rows run the same kernels."""
        found = {rows: ranked(layer.shape, rows, self._machine, self._count) for rows in SEARCHED}
        both = list(dict.fromkeys(found[1] + found[8]))
        return found | {1: both, 8: both}

    def tune(self, layer: Layer, started: dict[tuple[int, SkinnyConfig], Future[str]]) -> Found:
        found = Found(layer)
        inputs = Inputs.draw(layer, self._pool)
        for rows in BUCKETS:
            found.times[rows] = {None: microseconds(partial(inputs.composed, rows=rows), inputs.weights)}
        self._time(found, inputs, self.first_configs(layer), started)
        variants = {rows: self._variants(found, rows) for rows in SEARCHED}
        self._time(found, inputs, variants, self.compile(layer, variants))
        for rows in BUCKETS:
            if rows not in SEARCHED:
                close = {config for near in (1, 8) for config in _fastest(found, near, FINALISTS)}
                self._time(found, inputs, {rows: list(close)}, {})
        for rows in BUCKETS:
            found.best[rows] = self._first_right(found, inputs, rows)
        return found

    def _variants(self, found: Found, rows: int) -> list[SkinnyConfig]:
        """The best so far with more or less on the way: stages, prefetch, an early start."""
        shape = found.layer.shape
        variants = []
        for config in _fastest(found, rows, FINALISTS):
            deeper = [replace(config, stages=config.stages + more) for more in (-1, 1) if config.stages + more > 1]
            variants += [one for one in deeper if predicted_us(one, shape, rows, self._machine) < float("inf")]
            if self._machine.hopper:
                variants += [replace(config, prefetch=size // config.block_n) for size in PREFETCHED]
                variants.append(replace(config, early=False))
        return variants

    def _time(
        self,
        found: Found,
        inputs: Inputs,
        configs: dict[int, list[SkinnyConfig]],
        started: dict[tuple[int, SkinnyConfig], Future[str]],
    ) -> None:
        for rows, wanted in configs.items():
            for config in wanted:
                compiling = started.get((block_rows(rows), config))
                try:
                    if compiling is not None and (failure := compiling.result()):
                        found.failures.append(failure)
                        continue
                    found.times[rows][config] = microseconds(
                        partial(inputs.skinny, config=config, rows=rows), inputs.weights
                    )
                except Exception as error:  # noqa: BLE001 - one failure must not end the search
                    found.failures.append(f"{rows} rows, {config}: {type(error).__name__}: {error}"[:300])

    def _first_right(self, found: Found, inputs: Inputs, rows: int) -> SkinnyConfig | None:
        """The fastest whose result is right."""
        expected = inputs.expected(rows)
        for config, _ in sorted(found.times[rows].items(), key=lambda item: item[1]):
            if config is None:
                return None
            result = inputs.skinny(inputs.weights[0], config, rows).float()
            error = float((result - expected).norm() / expected.norm())
            if error < TOLERANCE:
                return config
            found.failures.append(f"{rows} rows, {config}: error {error:.1e}")
        return None


def _fastest(found: Found, rows: int, count: int) -> list[SkinnyConfig]:
    kernels = [(config, time) for config, time in found.times[rows].items() if config is not None]
    return [config for config, _ in sorted(kernels, key=lambda item: item[1])[:count]]


def print_tables(results: list[Found], bandwidth: float) -> dict[str, dict[int, float]]:
    """Each layer's best at some numbers of rows, then the byte-weighted shares of the bandwidth by model and rows."""
    widths = (24, 4, 8, 8, 7, 30)
    print(report.row(("layer", "rows", "us", "cublas", "share", "configuration"), widths))
    for found in results:
        for rows in SEARCHED:
            us = found.best_us(rows)
            share = found.layer.weight_bytes / us / 1e-6 / bandwidth
            cells = (
                f"{found.layer.model} {found.layer.name}",
                str(rows),
                f"{us:.1f}",
                f"{found.times[rows][None]:.1f}",
            )
            print(report.row((*cells, f"{share:.0%}", describe(found.best[rows])), widths))
    shares: dict[str, dict[int, float]] = {}
    for model in dict.fromkeys(found.layer.model for found in results):
        own = [found for found in results if found.layer.model == model]
        size = sum(found.layer.count * found.layer.weight_bytes for found in own)
        for rows in BUCKETS:
            seconds = sum(found.layer.count * found.best_us(rows) for found in own) * 1e-6
            shares.setdefault(model, {})[rows] = size / seconds / bandwidth
        print(f"{model}: " + "  ".join(f"{rows}: {share:.1%}" for rows, share in shares[model].items()))
    return shares


def write(results: list[Found], machine: Machine, bandwidth: float, shares: object, install: bool) -> None:
    folder = report.folder_out()
    entries = merged(table_entries(machine, TABLES), {found.layer.shape: found.best for found in results}, machine)
    for place in [folder, TABLES] if install else [folder]:
        write_table(place, machine, entries)
    timings = {
        f"{found.layer.model} {found.layer.name}": {
            rows: {describe(config): round(time, 2) for config, time in sorted(times.items(), key=lambda item: item[1])}
            for rows, times in found.times.items()
        }
        for found in results
    }
    report.write("tune_kernels", {"read_bandwidth": bandwidth, "shares": shares, "us": timings}, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = list(dict.fromkeys(layer.model for layer in LAYERS))
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--candidates", type=int, default=16, help="configurations by layer and rows (%(default)s)")
    parser.add_argument("--install", action="store_true", help="also put the table beside the kernels")
    arguments = parser.parse_args()
    begun = time.monotonic()
    machine = machine_of(0)
    choose_folder(version("triton"), machine.name, machine.capability)
    layers = [layer for layer in LAYERS if layer.model in arguments.models]
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(max(1, cores - 1), multiprocessing.get_context("spawn")) as compilers:
        pool = torch.empty(POOL_BYTES // 2, dtype=DTYPE, device=DEVICE).normal_(0, 0.02)
        tuner = Tuner(machine, pool, compilers, arguments.candidates)
        compiling = [tuner.compile(layer, tuner.first_configs(layer)) for layer in layers]
        bandwidth = read_bandwidth(DEVICE)
        print(f"{machine.name}: reads {bandwidth / 1e12:.2f} TB/s", flush=True)
        results = []
        for layer, started in zip(layers, compiling, strict=True):
            try:
                results.append(tuner.tune(layer, started))
            except Exception:  # noqa: BLE001 - one failure must not end the search
                traceback.print_exc()
            print(f"{time.monotonic() - begun:.0f} s: {layer.model} {layer.name}", flush=True)
    failures = [f"{found.layer.name}: {text}" for found in results for text in found.failures]
    print(f"{len(failures)} configurations failed", *failures[:12], sep="\n  ")
    write(results, machine, bandwidth, print_tables(results, bandwidth), arguments.install)
    print(f"{time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
