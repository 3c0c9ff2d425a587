"""Quantized linear layers on the GPU at hand: our kernels in several configurations, humming-kernels, bf16 cuBLAS.

    python -m benchmarks.quantized_speed [--model r1-7b] [--formats int4 w8a8 fp8] [--humming FOLDER] [--seconds 150]

For each matrix of the model and each number of rows: microseconds of the layer with its bias, gating and residual,
inside one CUDA graph over at least 512 MB of distinct weights; each of our results is first compared with the
definition in float32. Rounding the input counts where the format rounds it; the norm before a layer does not. The share
is that of the read bandwidth measured in the same run; the last lines weigh all matrices by their bytes. Files go to
``$OUT`` or benchmarks/results: the figures, and the table of configurations that the kernels read; --install also puts
the table where they look for it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.floors import read_bandwidth
from benchmarks.graph_times import graph_microseconds
from benchmarks.quantized_layers import FORMATS, MOST_CHECKED, QuantizedLayer, draw_matrix, layers, specialisations
from benchmarks.quantized_peer import Peer
from benchmarks.tuned_layers import DTYPE, LAYERS, ROTATED_BYTES, Layer
from engines.kernels.cuda.binary_cache import choose_folder
from engines.kernels.cuda.quantized_layout import device_codes
from engines.kernels.cuda.quantized_tuning import (
    BUCKETS,
    MOST_ROWS,
    TABLES,
    QuantizedConfig,
    QuantizedShape,
    fields_of,
    ranked,
    table_path,
)
from engines.kernels.cuda.tuning import Machine, machine_of

DEVICE = torch.device("cuda")
ROWS = (1, 8, 16, 64, 256, 1024, 8192)
TOLERANCE = {"int4": 4e-3, "int8": 4e-3, "w8a8": 1e-2, "fp8": 2e-2}
"""Of bfloat16 results; a last bit of the input's scale can move one of its codes by a step."""
Key = tuple[str, str, int, QuantizedConfig]
"""Layer, format, rows, configuration."""


@dataclass(slots=True)
class Found:
    """Of one layer in one format, microseconds by rows."""

    layer: Layer
    format: str
    key: str
    weight_bytes: int
    ours: dict[int, dict[QuantizedConfig | None, float]] = field(default_factory=dict)
    """None: the way of many rows."""
    plain: dict[int, float] = field(default_factory=dict)
    peer: dict[int, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def best(self, rows: int) -> tuple[QuantizedConfig | None, float] | None:
        times = self.ours.get(rows)
        return min(times.items(), key=lambda item: item[1]) if times else None


def compile_one(machine: Machine, layer: Layer, format: str, rows: int, config: QuantizedConfig) -> str:
    """In a process of its own, which has no GPU; returns what went wrong."""
    try:
        from engines.kernels.cuda.compile_pool import compile_for
        from engines.kernels.cuda.device import rehearse_on, rehearsed

        if not rehearsed():
            rehearse_on(machine)
            compile_for(machine.capability)
        for one in specialisations(layer, format, rows, config):
            one.compile()
    except Exception as error:  # noqa: BLE001 - one failure must not end the search
        return f"{config}: {type(error).__name__}: {error}"[:300]
    return ""


def shape_of(layer: Layer, format: str) -> QuantizedShape:
    codes = device_codes(draw_matrix(format, layer.shape.lines, layer.shape.depth, torch.device("meta")))
    assert codes is not None
    return QuantizedShape.of(codes, layer.shape.gated)


def start_compiling(
    machine: Machine, chosen: list[Layer], formats: list[str], count: int, pool: ProcessPoolExecutor
) -> dict[Key, Future[str]]:
    found = {}
    for format in formats:
        for layer in chosen:
            for rows in (rows for rows in ROWS if rows <= MOST_ROWS):
                for config in ranked(shape_of(layer, format), rows, machine, count):
                    task = pool.submit(compile_one, machine, layer, format, rows, config)
                    found[layer.name, format, rows, config] = task
    return found


class Bench:
    def __init__(self, compiling: dict[Key, Future[str]], peer: Peer, ends: float) -> None:
        self._compiling, self._peer, self._ends = compiling, peer, ends
        self._plain: dict[str, dict[int, float]] = {}

    @property
    def peer_failures(self) -> list[str]:
        return self._peer.failures

    def measure(self, layer: Layer, format: str) -> Found:
        drawn = QuantizedLayer.draw(layer, format, max(ROWS), DEVICE)
        found = Found(layer, format, drawn.shape.key(), drawn.weight_bytes)
        if layer.name not in self._plain:
            self._plain[layer.name] = plain_times(layer, drawn.x)
        found.plain = self._plain[layer.name]
        expected = drawn.expected(MOST_CHECKED)
        for rows in ROWS:
            times = found.ours.setdefault(rows, {})
            for (name, wanted, count, config), task in self._compiling.items():
                if (name, wanted, count) == (layer.name, format, rows):
                    if failure := task.result():
                        found.failures.append(failure)
                        continue
                    self._time(found, drawn, rows, config, expected)
            if rows >= 64 or not times:
                self._time(found, drawn, rows, None, expected)
        if time.monotonic() < self._ends:
            found.peer = self._peer.times(drawn, [rows for rows in ROWS if rows <= 1024])
        return found

    def _time(
        self, found: Found, drawn: QuantizedLayer, rows: int, config: QuantizedConfig | None, expected: torch.Tensor
    ) -> None:
        run = partial(drawn.composed, rows=rows) if config is None else partial(drawn.kernel, rows=rows, config=config)
        try:
            checked = min(rows, MOST_CHECKED)
            result = run(drawn.copies[0])[:checked].float()
            error = float((result - expected[:checked]).norm() / expected[:checked].norm())
            if not error < TOLERANCE[found.format]:
                found.failures.append(f"{rows} rows, {config}: error {error:.1e}")
                return
            found.ours[rows][config] = drawn.time(run, rows)
        except Exception as error:  # noqa: BLE001 - one failure must not end the search
            found.failures.append(f"{rows} rows, {config}: {type(error).__name__}: {error}"[:300])


def plain_times(layer: Layer, x: torch.Tensor) -> dict[int, float]:
    """cuBLAS's product in bfloat16, alone."""
    copies = max(2, -(-ROTATED_BYTES // layer.weight_bytes))
    weights = [torch.randn(layer.shape.depth, layer.shape.lines, device=DEVICE, dtype=DTYPE) for _ in range(2)]
    weights += [weights[0].clone() for _ in range(copies - 2)]
    turned = [weight.view(layer.shape.lines, layer.shape.depth).t() for weight in weights]
    found = {}
    for rows in ROWS:
        taken = turned if rows <= MOST_CHECKED else turned[:2]
        calls = [partial(torch.mm, x[:rows], taken[number % len(taken)]) for number in range(max(len(taken), 4))]
        found[rows] = graph_microseconds(calls, 3, warm=calls[0])
    return found


def describe(config: QuantizedConfig | None) -> str:
    if config is None:
        return "many rows"
    form = f"{config.parts} parts" if config.parts else "wide"
    return f"n{config.block_n} {form} s{config.splits} w{config.warps} st{config.stages}"


def print_found(found: Found, bandwidth: float) -> None:
    widths = (16, 5, 9, 9, 9, 7, 8, 30)
    for rows in ROWS:
        best = found.best(rows)
        if best is None:
            continue
        config, us = best
        peer = found.peer.get(rows)
        cells = (
            f"{found.format} {found.layer.name}",
            str(rows),
            f"{us:.1f}",
            f"{peer:.1f}" if peer else "-",
            f"{found.plain[rows]:.1f}",
            f"{found.weight_bytes / us / 1e-6 / bandwidth:.0%}",
            f"{2e-6 * rows * found.layer.shape.lines * found.layer.shape.depth / us:.0f}",
            describe(config),
        )
        print(report.row(cells, widths), flush=True)


def summaries(results: list[Found], bandwidth: float) -> dict[str, dict[int, dict[str, float]]]:
    """By format and rows, over all matrices as often as the model has them: milliseconds of each, share of ours."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for format in dict.fromkeys(one.format for one in results):
        own = [one for one in results if one.format == format]
        for rows in ROWS:
            bests = [one.best(rows) for one in own]
            if not all(bests):
                continue
            ours = sum(one.layer.count * best[1] for one, best in zip(own, bests, strict=True) if best)
            line = {
                "ours_ms": ours / 1000,
                "cublas_ms": sum(one.layer.count * one.plain[rows] for one in own) / 1000,
                "share": sum(one.layer.count * one.weight_bytes for one in own) / ours / 1e-6 / bandwidth,
            }
            if all(rows in one.peer for one in own):
                line["humming_ms"] = sum(one.layer.count * one.peer[rows] for one in own) / 1000
            found.setdefault(format, {})[rows] = line
            print(f"{format} {rows} rows: " + "  ".join(f"{name} {value:.3f}" for name, value in line.items()))
    return found


def table(results: list[Found]) -> dict[str, dict[str, list[int] | None]]:
    """Entries by shape: each bucket takes what is best at the nearest measured rows that are not fewer."""
    entries: dict[str, dict[str, list[int] | None]] = {}
    for found in results:
        for bucket in BUCKETS:
            rows = min(rows for rows in ROWS if rows >= bucket)
            best = found.best(rows)
            if best is not None:
                entries.setdefault(found.key, {})[str(bucket)] = None if best[0] is None else fields_of(best[0])
    return entries


def write(results: list[Found], machine: Machine, facts: dict[str, object], install: bool) -> None:
    folder = report.folder_out()
    entries = table(results)
    for place in [folder, TABLES] if install else [folder]:
        path = table_path(machine, place)
        old = json.loads(path.read_text())["entries"] if path.exists() else {}
        path.write_text(json.dumps({"gpu": machine.name, "entries": old | entries}, indent=1) + "\n")
    figures = {
        f"{found.format} {found.layer.name}": {
            "weight_bytes": found.weight_bytes,
            "cublas": found.plain,
            "humming": found.peer,
            "ours": {
                rows: {describe(config): round(us, 2) for config, us in sorted(times.items(), key=lambda item: item[1])}
                for rows, times in found.ours.items()
            },
            "failures": found.failures,
        }
        for found in results
    }
    report.write("quantized_speed", facts | {"us": figures}, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted({layer.model for layer in LAYERS}), default="r1-7b")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["int4", "fp8", "w8a8"])
    parser.add_argument("--candidates", type=int, default=5, help="configurations by layer and rows (%(default)s)")
    parser.add_argument("--humming", type=Path, help="folder of the unpacked humming-kernels, if not installed")
    parser.add_argument("--humming-seconds", type=float, default=60.0, help="for compiling its kernels (%(default)s)")
    parser.add_argument("--seconds", type=float, default=150.0, help="start no further layer after (%(default)s)")
    parser.add_argument("--install", action="store_true", help="also put the table beside the kernels")
    arguments = parser.parse_args()
    begun = time.monotonic()
    machine = machine_of(0)
    choose_folder(version("triton"), machine.name, machine.capability)
    chosen = layers(arguments.model)
    bandwidth = read_bandwidth(DEVICE)
    torch.cuda.empty_cache()
    print(f"{machine.name}: reads {bandwidth / 1e12:.2f} TB/s", flush=True)
    cores = len(os.sched_getaffinity(0))
    results: list[Found] = []
    with ProcessPoolExecutor(max(1, cores - 1), multiprocessing.get_context("spawn")) as compilers:
        compiling = start_compiling(machine, chosen, arguments.formats, arguments.candidates, compilers)
        bench = Bench(compiling, Peer(arguments.humming, arguments.humming_seconds), begun + arguments.seconds)
        print(
            report.row(("layer", "rows", "us", "humming", "cublas", "share", "TFLOP/s", ""), (16, 5, 9, 9, 9, 7, 8, 30))
        )
        for format in arguments.formats:
            for layer in chosen:
                if time.monotonic() - begun > arguments.seconds:
                    print(f"not measured for want of time: {format} {layer.name}")
                    continue
                results.append(bench.measure(layer, format))
                print_found(results[-1], bandwidth)
                torch.cuda.empty_cache()
        for task in compiling.values():
            task.cancel()
    failures = [f"{one.format} {one.layer.name}: {text}" for one in results for text in one.failures]
    print(f"{len(failures)} failed", *failures[:20], *bench.peer_failures[:10], sep="\n  ")
    facts = {"read_bandwidth": bandwidth, "sums": summaries(results, bandwidth), "peer": bench.peer_failures}
    write(results, machine, facts, arguments.install)
    print(f"{time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
