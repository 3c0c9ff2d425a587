"""Finds how the expert products of a layer are best cut on the GPU at hand, and times the whole layer.

    python -m benchmarks.tune_experts [--install] [--seconds 60]

The layer is V2-Lite's with random weights, over sets of weights that no cache holds; routing is uniform. For each
number of tokens the candidates are compiled in all cores and timed inside CUDA graphs; then each kernel of the layer
and the whole of it. Prints microseconds and the share of the read bandwidth; the table of the GPU goes to ``$OUT`` or
benchmarks/results, and with --install to where the kernels look for it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import partial

import torch
from torch.nn import functional

from benchmarks import report
from benchmarks.floors import read_bandwidth
from benchmarks.graph_times import graph_microseconds
from engines.kernels import Router, silu_mul
from engines.kernels.cuda.expert_tuning import (
    BUCKETS,
    MANY,
    TABLES,
    Tile,
    Tiles,
    bucket_of,
    default_tiles,
    layer_key,
    table_name,
)
from engines.kernels.cuda.experts import Grouping, combine, expert_products
from engines.kernels.cuda.experts_one import one_token
from engines.kernels.cuda.grouping import group_pairs
from engines.kernels.cuda.mixture import MOST_ALONE, mixture
from engines.kernels.cuda.routing import Routed, choose_experts
from engines.kernels.cuda.scratch import counters
from tests.expert_cases import EPS, ExpertCase, Shape

DEVICE = torch.device("cuda", 0)
WIDTH, INNER, EXPERTS, CHOSEN, SHARED = 2048, 1408, 64, 6, 2
COPIES = 3
"""Of the weights: 1.1 GB each."""
TOKENS = (*BUCKETS, 1024, 8192)
SHARED_MEMORY = 227 << 10


def candidates(tokens: int, rows: int) -> Iterator[Tile]:
    """``rows`` weight lines a column: 2 for gate and up, else 1."""
    if tokens == 1 and rows == 1:
        # A token's experts side by side: a tile has the columns of all of them.
        shapes = [(8, 64), (8, 128), (16, 64), (16, 128), (32, 64)]
        yield from (Tile(8, n, k, 8, s) for n, k in shapes for s in (3, 4, 6) if 16 * (n + 8) * k * s <= SHARED_MEMORY)
        return
    if bucket_of(tokens) == MANY:
        sizes = [(128, 64, 8), (128, 128, 8), (64, 128, 8), (128, 256, 8), (256, 128, 8)]
        found = [Tile(m, n, 64, w, s) for m, n, w in sizes for s in (3, 4)]
    else:
        pairs = (16,) if tokens <= 32 else (16, 32) if tokens <= 128 else (16, 32, 64)
        shapes = [(16, 128), (16, 256), (32, 64), (32, 128), (32, 256), (64, 64), (64, 128)]
        found = [Tile(m, n, k, 4, s) for m in pairs for n, k in shapes for s in (3, 5)]
    for tile in found:
        stage = 2 * tile.depth * (rows * tile.columns + tile.pairs)
        sums = 4 * rows * tile.pairs * tile.columns // (32 * tile.warps)
        loaded = stage * (tile.stages - 1)
        if stage * tile.stages <= SHARED_MEMORY and sums <= 600 and (bucket_of(tokens) == MANY or loaded >= 16 << 10):
            yield tile


class Step:
    """One step of so many tokens through the layer; each copy of the weights has a routing of its own."""

    def __init__(self, case: ExpertCase, copies: list[ExpertCase], tokens: int) -> None:
        self.tokens, self.case = tokens, case
        self.cases, self.scratch = copies, counters(DEVICE)
        self.few = bucket_of(tokens) != MANY
        self.routed: list[Routed] = []
        self.groupings: list[Grouping] = []
        for layer in range(COPIES):
            routed = choose_experts(
                case.hidden, case.gain, EPS, self.router(layer), SHARED, case.batch, self.scratch, False, False
            )
            grouping = group_pairs(routed.experts, EXPERTS + SHARED)
            self.routed.append(routed)
            self.groupings.append(Grouping(grouping.counts, None) if self.few else grouping)

    def router(self, layer: int) -> Router:
        return self.case.with_rule(uniform_layer=layer)

    def products(self, tiles: Tiles, layer: int) -> torch.Tensor:
        """One token's with the sum in them."""
        if self.tokens <= MOST_ALONE:
            return one_token(self.case.hidden, self.routed[layer], self.cases[layer].stacks, tiles, True)
        return expert_products(self.routed[layer], self.cases[layer].stacks, self.groupings[layer], tiles, self.few)

    def whole(self, tiles: Tiles, layer: int) -> torch.Tensor:
        case = self.case
        return mixture(case.hidden, case.gain, EPS, self.router(layer), self.cases[layer].stacks, case.batch, tiles)

    def weight_bytes(self) -> float:
        """Of gate, up and down of the experts that tokens take, on average over the copies."""
        active = sum(int((grouping.counts > 0).sum()) for grouping in self.groupings) / COPIES
        return active * 3 * WIDTH * INNER * 2


def over_copies(call: Callable[[int], object]) -> float:
    return graph_microseconds([partial(call, layer) for layer in range(COPIES)] * 5)


class Search:
    def __init__(self, step: Step, deadline: float) -> None:
        self.step, self.deadline = step, deadline
        self.failures: list[str] = []

    def _try(self, tiles: Tiles) -> None:
        try:
            self.step.products(tiles, 0)
        except Exception as error:  # noqa: BLE001 - one configuration must not end the search
            self.failures.append(f"{tiles}: {type(error).__name__}: {error}"[:200])

    def _time(self, tiles: Tiles) -> float:
        if time.monotonic() > self.deadline:
            return float("inf")
        try:
            return over_copies(partial(self.step.products, tiles))
        except Exception as error:  # noqa: BLE001 - nor one size
            self.failures.append(f"{tiles}: {type(error).__name__}: {error}"[:200])
            return float("inf")

    def run(self, compilers: ThreadPoolExecutor) -> Tiles:
        """The fastest gate and up beside the default down, then the fastest down beside that."""
        tokens, best = self.step.tokens, default_tiles(self.step.tokens)
        wide = [Tiles(tile, best.down) for tile in candidates(tokens, 2)]
        narrow = [Tiles(best.gate_up, tile) for tile in candidates(tokens, 1)]
        list(compilers.map(self._try, wide + narrow))
        times = {tiles: self._time(tiles) for tiles in [best, *wide]}
        gate_up = min(times, key=times.__getitem__).gate_up
        times = {tiles: self._time(Tiles(gate_up, tiles.down)) for tiles in [best, *narrow]}
        return Tiles(gate_up, min(times, key=times.__getitem__).down)


def parts(step: Step, tiles: Tiles) -> dict[str, float]:
    """Microseconds of the layer and of what it is made of."""
    case, scratch = step.case, step.scratch
    products = [] if step.tokens <= MOST_ALONE else [step.products(tiles, layer) for layer in range(COPIES)]

    def sum_up(layer: int) -> torch.Tensor:
        return combine(case.hidden, products[layer], step.routed[layer], EXPERTS + SHARED, reset=None, early=step.few)

    def choose(layer: int) -> Routed:
        router = step.router(layer)
        return choose_experts(case.hidden, case.gain, EPS, router, SHARED, case.batch, scratch, False, step.few)

    return {
        "layer": over_copies(partial(step.whole, tiles)),
        "route": over_copies(choose),
        "products": over_copies(partial(step.products, tiles)),
        "combine": over_copies(sum_up) if products else 0.0,
        "torch": grouped_mm(step),
    }


def grouped_mm(step: Step) -> float:
    """Microseconds of torch's own products over pairs that are already sorted; 0 for few tokens."""
    if step.few:
        return 0.0
    rows = torch.randn(step.tokens * (CHOSEN + SHARED), WIDTH, device=DEVICE, dtype=torch.bfloat16)
    ends = [grouping.counts.cumsum(0).int() for grouping in step.groupings]

    def run(layer: int) -> torch.Tensor:
        stacks = step.cases[layer].stacks
        gate_up = functional.grouped_mm(rows, stacks.gate_up.transpose(1, 2), offs=ends[layer])
        return functional.grouped_mm(silu_mul(gate_up), stacks.down.transpose(1, 2), offs=ends[layer])

    return over_copies(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    facts = report.print_header("expert layers")
    bandwidth = read_bandwidth(DEVICE)
    compilers = ThreadPoolExecutor(8)
    copies = [ExpertCase(Shape(1, WIDTH, INNER, EXPERTS, CHOSEN, SHARED), DEVICE) for _ in range(COPIES)]
    entries: dict[str, list[list[int]]] = {}
    results, lines, failures = {}, [], []
    for tokens in arguments.tokens:
        # A step's own tokens; the weights are the copies'.
        case = ExpertCase(Shape(tokens, WIDTH, 16, EXPERTS, CHOSEN, SHARED), DEVICE)
        step = Step(case, copies, tokens)
        search = Search(step, deadline)
        tiles = search.run(compilers)
        failures += search.failures
        entries[str(bucket_of(tokens))] = [list(astuple(tiles.gate_up)), list(astuple(tiles.down))]
        times = parts(step, tiles)
        size = step.weight_bytes()
        flops = 6 * WIDTH * INNER * tokens * (CHOSEN + SHARED)
        results[tokens] = {**times, "weight_bytes": size, "tiles": entries[str(bucket_of(tokens))]}
        share = size / times["products"] * 1e6 / bandwidth
        cells = [
            *(f"{value:.1f}" for value in times.values()),
            f"{share:.0%}",
            f"{flops / times['products'] / 1e6:.0f}",
        ]
        lines.append([str(tokens), *cells, str(entries[str(bucket_of(tokens))])])
    folder = report.folder_out()
    report.write("tune_experts", {**facts, "bandwidth": bandwidth, "results": results, "failures": failures}, folder)
    table = {"entries": {layer_key(WIDTH, INNER, EXPERTS + SHARED): entries}}
    places = [folder, *([TABLES] if arguments.install else [])]
    for place in places:
        place.mkdir(exist_ok=True)
        (place / table_name(torch.cuda.get_device_name(DEVICE))).write_text(json.dumps(table, indent=1) + "\n")
    print("\n".join(failures[:10]))
    print(f"read bandwidth {bandwidth / 1e12:.2f} TB/s; microseconds of a layer of V2-Lite:")
    widths = [7, 8, 8, 9, 8, 8, 6, 8, 60]
    print(report.row(["tokens", "layer", "route", "products", "combine", "torch", "share", "TFLOP/s", "tiles"], widths))
    for line in lines:
        print(report.row(line, widths))


if __name__ == "__main__":
    main()
