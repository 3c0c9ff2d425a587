"""The experts of many tokens on a Hopper GPU: grouped products in Gluon, or the Triton kernels that read by pairs.

    python -m benchmarks.grouped_speed [--seconds 40]

The layer is V2-Lite's with random weights, over sets of weights that no cache holds; routing is uniform. First each
tile of the products is checked against float32 in a process of its own, which is killed if it hangs; then those that
are right are timed inside CUDA graphs, in another one. One line for each number of tokens: microseconds and TFLOP/s of
the products of both ways, and microseconds of what is around them. The last lines name the fastest tiles in long steps,
and from how many tokens on they are the faster way.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

from benchmarks import kernel_checks, report
from benchmarks.graph_times import graph_microseconds
from engines.kernels.cuda import grouped, hopper_grouped
from engines.kernels.cuda.expert_tuning import tiles_for
from engines.kernels.cuda.experts import combine, expert_products
from engines.kernels.cuda.grouping import group_pairs, place_pairs
from engines.kernels.cuda.hopper_grouped import SLOT, GroupedTile, Rows
from engines.kernels.cuda.routing import Routed, choose_experts
from engines.kernels.cuda.scratch import counters
from tests.expert_cases import EPS, ExpertCase, Shape

WIDTH, INNER, EXPERTS, CHOSEN, SHARED = 2048, 1408, 64, 6, 2
NUMBER = EXPERTS + SHARED
TILES = [GroupedTile(4, band, lag) for band, lag in ((16, 1), (16, 0), (16, 2), (8, 1), (32, 1), (64, 1))]
TILES += [GroupedTile(3, 16, 1)]
LONG = 8192
TOKENS = [LONG, 512, 2048, 16384, 256, 300, 1024, 4096]
"""In the order of what is asked first, should time run out."""
COPIES = 3
"""Of the weights: 1.1 GB each."""
CHECK_SECONDS = 30
TOLERANCE = 8e-3
"""Of ||result - definition|| / ||definition||."""
REPLAYS = 3


def device() -> torch.device:
    return torch.device("cuda", 0)


def uniform(tokens: int, layer: int) -> Routed:
    """A step whose experts are drawn uniformly."""
    case = ExpertCase(Shape(tokens, WIDTH, 16, EXPERTS, CHOSEN, SHARED), device())
    router = case.with_rule(uniform_layer=layer)
    return choose_experts(case.hidden, case.gain, EPS, router, SHARED, case.batch, counters(device()), False, False)


def skewed(tokens: int) -> Routed:
    """Half the tokens take the same experts, a tenth only fills the step up, and some experts get nothing."""
    routed = uniform(tokens, 3)
    routed.experts[:, :CHOSEN] = torch.rand(tokens, 40, device=device()).topk(CHOSEN, dim=1).indices.int()
    routed.experts[::2, :CHOSEN] = torch.arange(CHOSEN, device=device(), dtype=torch.int32) + 7
    routed.experts[::10] = -1
    return routed


def weights() -> ExpertCase:
    return ExpertCase(Shape(1, WIDTH, INNER, EXPERTS, CHOSEN, SHARED), device())


def check(tile: GroupedTile) -> None:
    """Raises AssertionError where the layer's result is not that of float32, or another one in a graph."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory holds NaN
    grouped.FEWEST_TOKENS, layer = 0, weights()
    for tokens, drawn in itertools.product((2, 130, 1000, 3001), (True, False)):
        routed = uniform(tokens, layer=7) if drawn else skewed(tokens)
        hidden = torch.randn(tokens, WIDTH, device=device()).bfloat16()
        real = (routed.experts[:, 0] >= 0).nonzero()[:, 0]
        run = partial(grouped.grouped_mixture, hidden, routed, layer.stacks, (tile, tile))
        expected = definition(hidden, routed, layer)[real]
        result = run()
        assert result is not None, "does not fit"
        distance = float((result[real].float() - expected).norm() / expected.norm())
        assert distance < TOLERANCE, f"{tokens} tokens: {distance}"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = run()
        graph.replay()
        assert again is not None
        assert torch.equal(again[real], result[real]), f"{tokens} tokens: another in a graph"


def definition(hidden: torch.Tensor, routed: Routed, layer: ExpertCase) -> torch.Tensor:
    """As ``ExpertCase.expected``, of a step made elsewhere."""
    x, total = routed.normed.float(), hidden.float()
    for expert in range(NUMBER):
        token, column = (routed.experts == expert).nonzero(as_tuple=True)
        if token.numel():
            gate, up = (x[token] @ layer.stacks.gate_up[expert].float().t()).chunk(2, dim=1)
            product = (torch.nn.functional.silu(gate) * up) @ layer.stacks.down[expert].float().t()
            total = total.index_add(0, token, product * routed.weights[token, column].unsqueeze(1))
    return total


def name_of(tile: GroupedTile) -> str:
    return f"{tile.stages}/band {tile.band}/lag {tile.lag}"


class Step:
    """One step through the layer; each copy of the weights has a routing of its own."""

    def __init__(self, tokens: int, layers: list[ExpertCase]) -> None:
        self.tokens, self.layers, self.stacks = tokens, layers, layers[0].stacks
        self.hidden = torch.randn(tokens, WIDTH, device=device()).bfloat16()
        self.routed = [uniform(tokens, layer) for layer in range(len(layers))]
        self.groupings = [group_pairs(routed.experts, NUMBER) for routed in self.routed]
        self.places = [place_pairs(routed.experts, NUMBER, SLOT) for routed in self.routed]
        most = [self.stacks.chosen_tiles(tokens, size) for size in (SLOT, 2 * SLOT)]
        self.rows = Rows(tokens, EXPERTS, SHARED, *most)
        empty = partial(torch.empty, dtype=torch.bfloat16, device=device())
        self.spread, self.gated, self.products = (
            empty(self.rows.total(0), WIDTH),
            empty(self.rows.total(SHARED), INNER),
            empty(self.rows.total(1), WIDTH),
        )
        self.first = self.rows.total(1) - self.rows.total(0)
        self.spread_rows(0)
        self.gate_up(TILES[0], 0)
        self.down(TILES[0], 0)

    def us(self, call: Callable[[int], object]) -> float:
        rounds = max(1, 8192 // self.tokens)
        return graph_microseconds([partial(call, layer) for layer in range(len(self.layers))] * rounds, REPLAYS)

    def spread_rows(self, layer: int) -> None:
        grouped.spread_rows(self.routed[layer], self.places[layer][1], self.stacks, self.spread)

    def gate_up(self, tile: GroupedTile, layer: int) -> None:
        stack, counts = self.layers[layer].stacks.gate_up, self.places[layer][0]
        normed = self.routed[layer].normed
        hopper_grouped.gate_up(self.spread, normed, stack, counts, self.rows, self.gated, tile)

    def down(self, tile: GroupedTile, layer: int) -> None:
        stack, counts = self.layers[layer].stacks.down, self.places[layer][0]
        hopper_grouped.down(self.gated, stack, counts, self.rows, self.products, tile)

    def sum_products(self, layer: int) -> None:
        routed, places = self.routed[layer], self.places[layer][1]
        grouped.sum_products(self.hidden, self.products, routed, places, self.stacks, self.first)

    def place(self, layer: int) -> None:
        place_pairs(self.routed[layer].experts, NUMBER, SLOT)

    def by_pairs(self, layer: int) -> torch.Tensor:
        tiles = tiles_for(self.tokens, WIDTH, INNER, NUMBER, device())
        stacks = self.layers[layer].stacks
        return expert_products(self.routed[layer], stacks, self.groupings[layer], tiles, early=False)

    def combine(self, layer: int) -> None:
        combine(self.hidden, self.pairs, self.routed[layer], NUMBER, reset=None, early=False)

    def times(self, gate_ups: list[GroupedTile], downs: list[GroupedTile]) -> dict[str, float]:
        """Microseconds."""
        found = {f"gate-up {name_of(tile)}": self.us(partial(self.gate_up, tile)) for tile in gate_ups}
        found |= {f"down {name_of(tile)}": self.us(partial(self.down, tile)) for tile in downs}
        found["by pairs"] = self.us(self.by_pairs)
        self.pairs = self.by_pairs(0)
        around = {"place": self.place, "spread": self.spread_rows, "sum": self.sum_products, "combine": self.combine}
        return found | {name: self.us(call) for name, call in around.items()}


def told(tokens: int, found: dict[str, float]) -> str:
    """A line; the useful multiplications of a token's experts are what rates are of."""
    flops = 2e-6 * tokens * (CHOSEN + SHARED) * WIDTH * INNER
    kinds = {"gate-up": 2, "down": 1, "by pairs": 3}
    shown = []
    for way in sorted(found, key=lambda way: (way.split()[0], found[way])):
        products = next((count for kind, count in kinds.items() if way.startswith(kind)), 0)
        rate = f" {products * flops / found[way]:.0f}" if products else ""
        shown.append(f"{way} {found[way]:.0f} us{rate}")
    return f"{tokens}: " + " | ".join(shown)


def fastest(found: dict[str, float], kind: str, tiles: list[GroupedTile]) -> list[GroupedTile]:
    return sorted(tiles, key=lambda tile: found[f"{kind} {name_of(tile)}"])


def sums(found: dict[str, float], tiles: tuple[GroupedTile, GroupedTile]) -> tuple[float, float]:
    """Of all kernels behind routing and grouping: in Gluon, by pairs."""
    names = (f"gate-up {name_of(tiles[0])}", f"down {name_of(tiles[1])}", "spread", "sum")
    return sum(found[name] for name in names), found["by pairs"] + found["combine"]


def measure(indices: list[int], seconds: float) -> dict[str, object]:
    """Prints a line for each number of tokens, and the choice."""
    started, all_found = time.perf_counter(), dict[int, dict[str, float]]()
    gate_ups = downs = [TILES[index] for index in indices]
    layers = [weights() for _ in range(COPIES)]
    for tokens in TOKENS:
        if time.perf_counter() - started > seconds:
            print(f"# stopped after {seconds:.0f} s")
            break
        all_found[tokens] = Step(tokens, layers).times(gate_ups, downs)
        print(told(tokens, all_found[tokens]), flush=True)
        gate_ups, downs = (
            fastest(all_found[tokens], "gate-up", gate_ups)[:2] if tokens == LONG else gate_ups,
            fastest(all_found[tokens], "down", downs)[:2] if tokens == LONG else downs,
        )
    chosen = (gate_ups[0], downs[0])
    gains = {tokens: sums(found, chosen) for tokens, found in all_found.items()}
    faster = {tokens: new < old for tokens, (new, old) in gains.items()}
    fewest = min((least for least in faster if all(faster[more] for more in faster if more >= least)), default=None)
    print(f"# gate-up {name_of(chosen[0])}, down {name_of(chosen[1])}; with spread and sum, by pairs with combine, us:")
    print("# " + ", ".join(f"{tokens}: {new:.0f} {old:.0f}" for tokens, (new, old) in sorted(gains.items())))
    print(f"# faster from {fewest} tokens on")
    return {"us": all_found, "gate_up": asdict(chosen[0]), "down": asdict(chosen[1]), "fewest_tokens": fewest}


def main() -> int:
    arguments = kernel_checks.tile_arguments(__doc__, 40, "step")
    if arguments.check is not None:
        check(TILES[arguments.check])
        return 0
    if arguments.times is None:
        print(f"# experts, bf16: {torch.cuda.get_device_name()}, commit {report.commit()}; us, TFLOP/s", flush=True)
        names = {str(index): name_of(tile) for index, tile in enumerate(TILES)}
        right = kernel_checks.passing("benchmarks.grouped_speed", names, CHECK_SECONDS)
        return kernel_checks.time_apart("benchmarks.grouped_speed", right, arguments.seconds, grace=30)
    facts: dict[str, object] = {"device": torch.cuda.get_device_name(), "commit": report.commit()}
    facts |= measure(arguments.times, arguments.seconds)
    report.write("grouped_speed", facts, report.folder_out())
    return 0


if __name__ == "__main__":
    sys.exit(main())
