"""How far predicted step times are off on a live server that has seen half a minute of mixed traffic.

    python -m benchmarks.step_time_error                                     SmolLM2 on the CPU, two and a half minutes
    python -m benchmarks.step_time_error --device cuda --config r1-1.5b
    python -m benchmarks.step_time_error --device cuda --fit          and the simulator's costs from the same steps

All rows of the live check come at once. After the first half of the time the relative errors that the server shows
(/metrics: median and 95th percentile of its last 256 steps) are read once a second.

No model is better than the machine repeats itself, and on a CPU that is not much. So there the bar of the 95th
percentile is a multiple of the spread of identical steps: of those in the very same traffic, whose neighbours disturb
them as they disturb all others. The spread on an engine that has the machine to itself is printed beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

from benchmarks import report
from benchmarks.live_traffic import (
    CPU_MODEL,
    CPU_MODEL_LEN,
    CPU_THREADS,
    live_grid,
    mixed_traffic,
    served_model,
    vocabulary,
)
from benchmarks.metrics_page import read_page
from benchmarks.model_configs import CONFIGS
from benchmarks.served_steps import LoggedStep, fit_served, logged_steps, merged
from benchmarks.servers import Server
from benchmarks.simulation.live import drive, lead
from benchmarks.simulation.run import Outcome
from benchmarks.simulation.scoring import quantile
from benchmarks.simulation.workload import SimulatedRequest
from benchmarks.step_times import measure
from engines.generation.engine import GenerationEngine
from engines.protocol import EngineSpec
from server.catalog import resolve

GPU_BARS = 0.05, 0.12
"""Median and 95th percentile."""
CPU_MEDIAN_BAR = 0.08
SPREAD_FACTOR = 1.5
"""On the CPU the 95th percentile may be this many times that of identical steps."""
LEAST_REPEATS = 4
"""Steps of one size that say something about their spread."""


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors of predicted step times, means over the samples."""

    samples: int
    steps: int
    """Settled while samples were taken."""
    p50: float
    p95: float
    worst_p95: float


def spread_alone(seconds: float) -> float:
    """Of identical steps on an engine of this process, and nothing else on the machine."""
    source = str(resolve(CPU_MODEL))
    spec = EngineSpec(name="bench", source=source, max_model_len=CPU_MODEL_LEN, threads=CPU_THREADS)
    engine = GenerationEngine.load(spec, lambda progress: None)
    try:
        return spread(measure(engine, seconds).seconds.values())
    finally:
        engine.close()


def spread_in_traffic(steps: Sequence[LoggedStep]) -> float:
    """Of steps of the same size to within 2 %."""
    samples = merged(steps, most=len(steps))
    return spread(sample.seconds for sample in samples if len(sample.seconds) >= LEAST_REPEATS)


def spread(shapes: Iterable[Sequence[float]]) -> float:
    """95th percentile of the relative deviation of steps from the median of their shape; 0 where none is repeated."""
    deviations = []
    for repeats in shapes:
        typical = statistics.median(repeats)
        deviations += [abs(seconds / typical - 1) for seconds in repeats]
    return quantile(sorted(deviations), 0.95)


def errors_under(server: Server, requests: Sequence[SimulatedRequest], token_ids: int, seconds: float) -> Errors:
    """What the server shows in the second half of the traffic."""
    nonce = int(time.time()) % 10_000
    with ThreadPoolExecutor(1) as pool:
        traffic = pool.submit(drive, server.url, "m", token_ids, requests, processes=1, nonce=nonce)
        found = asyncio.run(_watch(server.port, traffic, seconds))
        traffic.result()
    return found


async def _watch(port: int, traffic: Future[list[Outcome]], seconds: float) -> Errors:
    await asyncio.sleep(lead(1) + seconds / 2)
    medians: list[float] = []
    tails: list[float] = []
    first = last = await read_page(port)
    end = time.monotonic() + seconds / 2
    while time.monotonic() < end and not traffic.done():
        last = await read_page(port)
        medians.append(last.value("step_error_p50"))
        tails.append(last.value("step_error_p95"))
        await asyncio.sleep(1)
    if not medians:
        raise RuntimeError("the traffic ended before the server had learnt")
    steps = last.value("step_seconds_count") - first.value("step_seconds_count")
    return Errors(len(medians), int(steps), statistics.fmean(medians), statistics.fmean(tails), max(tails))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--config", choices=list(CONFIGS), default="r1-1.5b", help="shapes on a GPU, random weights")
    parser.add_argument("--seconds", type=float, default=60.0, help="of traffic; the first half teaches")
    parser.add_argument("--load", type=float, default=0.9, help="over capacity")
    parser.add_argument("--fit", action="store_true", help="then do what benchmarks.served_steps does")
    parser.add_argument("--spread-seconds", type=float, default=60.0, help="for identical steps on the CPU")
    arguments = parser.parse_args()
    facts = report.print_header("Errors of predicted step times")
    on_cpu = arguments.device == "cpu"
    facts["device"] = "cpu" if on_cpu else report.device_name()
    spreads: dict[str, float] = {}
    if on_cpu:
        spreads["alone"] = spread_alone(arguments.spread_seconds)
    requests = mixed_traffic(live_grid(arguments.device), arguments.load, arguments.seconds, seed=1)
    token_ids = vocabulary(arguments.device, arguments.config)
    with served_model(arguments.device, arguments.config, log_level="debug") as server:
        found = errors_under(server, requests, token_ids, arguments.seconds)
        steps = logged_steps(server.log)
    if arguments.fit:
        fit_served(live_grid(arguments.device), steps, facts)
    spreads["in traffic"] = spread_in_traffic(steps[len(steps) // 2 :])
    if not spreads["in traffic"]:
        raise SystemExit("no step of the traffic was repeated: take more --seconds")
    for where, each in spreads.items():
        print(f"identical steps {where}: p95 of the deviation from their median {each:.1%}")
    median_bar, tail_bar = (CPU_MEDIAN_BAR, SPREAD_FACTOR * spreads["in traffic"]) if on_cpu else GPU_BARS
    print(f"{found.samples} samples over {found.steps} steps, after {arguments.seconds / 2:.0f} s of traffic:")
    print(f"  median of the relative error {found.p50:.1%}, bar {median_bar:.1%}; ratio {found.p50 / median_bar:.2f}")
    print(f"  95th percentile {found.p95:.1%}, bar {tail_bar:.1%}; ratio {found.p95 / tail_bar:.2f}")
    print(f"  95th percentile, worst sample {found.worst_p95:.1%}")
    print(
        "  over that of identical steps: " + ", ".join(f"{found.p95 / each:.2f} {at}" for at, each in spreads.items())
    )
    result: dict[str, object] = {"machine": facts, "load": vars(arguments), "errors": asdict(found)}
    result |= {"identical_steps_p95": spreads, "bars": [median_bar, tail_bar]}
    path = report.write(f"step_time_error_{arguments.device}", result)
    print(f"written to {path.relative_to(report.ROOT)}")
    if found.p50 > median_bar or found.p95 > tail_bar:
        raise SystemExit("the bar is missed")


if __name__ == "__main__":
    main()
