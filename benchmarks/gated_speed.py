"""The gated linear layer of prompts on a Hopper GPU: in one kernel, or a product by cuBLAS and a kernel that gates.

    python -m benchmarks.gated_speed [--seconds 24]

First each tile of the kernel is checked against float32 in a process of its own, which is killed if it hangs; then
those that are right are timed, inside CUDA graphs over weights in rotation, in another one: all of them for steps of
8,192 tokens, and of fewer tokens the best three. One line for each shape, the fastest first. The last lines name the
tile that takes the least time in long steps, and from how many of it for each processor on it is the faster way.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch.nn.functional import silu

from benchmarks import kernel_checks, report
from benchmarks.graph_times import graph_microseconds
from engines.kernels.cuda import elementwise, hopper_gated
from engines.kernels.cuda.hopper_gated import GatedTile

TILES = [GatedTile(4, band, lag) for band, lag in ((32, 1), (16, 0), (16, 1), (16, 2), (8, 1), (64, 1))]
LAYERS = {
    "r1-1.5b": (1536, 8960),
    "r1-7b": (3584, 18944),
    "v2-lite dense": (2048, 10944),
    "v2-lite shared": (2048, 2816),
}
"""Depth and width of the output."""
LONG = 8192
TOKENS = [LONG, 4096, 2048, 1024, 512]
CHECKS = [(1, 8, 64), (129, 136, 72), (700, 392, 1000), (1537, 2816, 2048), (5000, 8960, 1536)]
"""Rows, width, depth."""
SCALES = [1, 40]
"""Of the gates: those of the second leave what exponentials can be multiplied."""
CHECK_SECONDS = 25
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Of ||result - definition|| / ||definition||."""
REPLAYS = 5
GRAPH_US = 15_000
"""That the calls of one graph take, about."""
WEIGHTS = 4
TWO_KERNELS, PRODUCT = "cublas+silu", "(cublas)"

Call = Callable[[int], object]
Found = dict[str, dict[int, dict[str, float]]]
"""Microseconds by layer, rows and way."""


def name_of(tile: GatedTile) -> str:
    return f"{tile.stages}/band {tile.band}/lag {tile.lag}"


def draw(rows: int, width: int, depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """An input, and a weight whose products are about 1."""
    x = torch.randn(rows, depth, device="cuda").to(dtype)
    return x, (torch.randn(2 * width, depth, device="cuda") / depth**0.5).to(dtype)


def check(tile: GatedTile) -> None:
    """Raises AssertionError where the kernel's result is not that of float32, or another one in a graph."""
    for dtype, tolerance in TOLERANCE.items():
        for scale, (rows, width, depth) in itertools.product(SCALES, CHECKS):
            x, weight = draw(rows, width, depth, dtype)
            x *= scale
            behind = torch.full((rows + 64, width), torch.nan, dtype=dtype, device="cuda")
            output = behind[:rows]
            hopper_gated.gated_linear(x, weight, output, tile)
            gate, up = (x.float() @ weight.float().t()).chunk(2, dim=1)
            expected = silu(gate) * up
            distance = float((output.float() - expected).norm() / expected.norm())
            assert distance < tolerance, f"{dtype} {rows} x {depth} -> {width}: {distance}"
            assert bool(behind[rows:].isnan().all()), f"{rows} x {width}: wrote behind the end"
            first = output.clone()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                hopper_gated.gated_linear(x, weight, output, tile)
            for _ in range(3):
                output.fill_(torch.nan)
                graph.replay()
                assert torch.equal(output, first), f"{dtype} {rows} x {depth} -> {width}: another result in a graph"


def calls_of(rows: int, width: int, depth: int, tiles: Sequence[GatedTile]) -> dict[str, Call]:
    """Every way to compute the layer; a call takes one of ``WEIGHTS`` weights."""
    x, _ = draw(rows, 8, depth, torch.bfloat16)
    weights = [draw(1, width, depth, torch.bfloat16)[1] for _ in range(WEIGHTS)]
    output, both = (x.new_empty(rows, size) for size in (width, 2 * width))

    def product(index: int) -> None:
        torch.mm(x, weights[index].t(), out=both)

    def two(index: int) -> None:
        elementwise.silu_mul(x.mm(weights[index].t()))

    calls: dict[str, Call] = {TWO_KERNELS: two, PRODUCT: product}

    def together(tile: GatedTile, index: int) -> None:
        hopper_gated.gated_linear(x, weights[index], output, tile)

    return calls | {name_of(tile): partial(together, tile) for tile in tiles}


def times_of(rows: int, width: int, depth: int, tiles: Sequence[GatedTile]) -> dict[str, float]:
    """Microseconds of each way."""
    guess = rows * width * depth * 4 / 600e6
    count = max(WEIGHTS, min(64, int(GRAPH_US / guess)))
    found = {}
    for name, call in calls_of(rows, width, depth, tiles).items():
        ready = [partial(call, index) for index in range(WEIGHTS)]
        found[name] = graph_microseconds([ready[number % WEIGHTS] for number in range(count)], REPLAYS, ready[0])
    return found


def told(layer: str, rows: int, found: dict[str, float]) -> str:
    depth, width = LAYERS[layer]
    rate = 4e-6 * rows * depth * width
    ways = sorted(found, key=found.__getitem__)
    return f"{layer} {rows}: " + " | ".join(f"{way} {found[way]:.0f} us {rate / found[way]:.0f}" for way in ways)


def shares(indices: list[int], all_found: Found) -> dict[int, float]:
    """Of the two kernels' time in long steps, what each tile takes: its mean over the layers."""
    longs = [found[LONG] for found in all_found.values() if LONG in found]
    return {
        index: sum(found[name_of(TILES[index])] / found[TWO_KERNELS] for found in longs) / max(len(longs), 1)
        for index in indices
    }


def measure(indices: list[int], seconds: float) -> Found:
    """Prints a line for each shape."""
    started, all_found = time.perf_counter(), {layer: dict[int, dict[str, float]]() for layer in LAYERS}
    for rows in TOKENS:
        best = sorted(indices, key=shares(indices, all_found).__getitem__)
        for layer, (depth, width) in LAYERS.items():
            if time.perf_counter() - started > seconds:
                print(f"# stopped after {seconds:.0f} s")
                return all_found
            found = times_of(rows, width, depth, [TILES[index] for index in (best if rows == LONG else best[:3])])
            all_found[layer][rows] = found
            print(told(layer, rows, found), flush=True)
    return all_found


def choice(indices: list[int], all_found: Found) -> dict[str, object]:
    """The tile that takes the least time in long steps, and from how many of it for each processor on it takes less
    than two kernels in all layers and steps, if it does in any. Prints both."""
    all_shares = shares(indices, all_found)
    chosen = min(indices, key=all_shares.__getitem__)
    name, faster = name_of(TILES[chosen]), dict[float, bool]()
    print(f"# {name}: {all_shares[chosen]:.3f} of the two kernels' time in steps of {LONG}")
    for layer, by_rows in all_found.items():
        gains = {rows: found[TWO_KERNELS] / found[name] for rows, found in by_rows.items() if name in found}
        for rows, gain in gains.items():
            waves = hopper_gated.waves(rows, LAYERS[layer][1], torch.device("cuda", 0))
            faster[waves] = gain > 1 and faster.get(waves, True)
        shown = ", ".join(f"{gain:.3f} with {rows}" for rows, gain in gains.items())
        print(f"# {layer}: times as fast as two kernels: {shown}")
    enough = [waves for waves in faster if all(faster[more] for more in faster if more >= waves)]
    print(f"# faster from {min(enough, default=None)} tiles for each processor on")
    return {"tile": asdict(TILES[chosen]), "fewest_waves": min(enough, default=None)}


def main() -> int:
    arguments = kernel_checks.tile_arguments(__doc__, 24, "shape")
    if arguments.check is not None:
        check(TILES[arguments.check])
        return 0
    if arguments.times is None:
        print(
            f"# gated layers, bf16: {torch.cuda.get_device_name()}, commit {report.commit()}; us, TFLOP/s", flush=True
        )
        names = {str(index): name_of(tile) for index, tile in enumerate(TILES)}
        right = kernel_checks.passing("benchmarks.gated_speed", names, CHECK_SECONDS)
        return kernel_checks.time_apart("benchmarks.gated_speed", right, arguments.seconds, grace=20)
    all_found = measure(arguments.times, arguments.seconds)
    facts: dict[str, object] = {"device": torch.cuda.get_device_name(), "commit": report.commit(), "us": all_found}
    facts |= choice(arguments.times, all_found)
    report.write("gated_speed", facts, report.folder_out())
    return 0


if __name__ == "__main__":
    sys.exit(main())
