"""64 streams at once over the real server: what is left of the engine's speed behind HTTP and SSE."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from benchmarks.model_configs import CONFIGS
from benchmarks.servers import Server, random_weights_server
from benchmarks.workloads import OUTPUT_TEMPERATURE
from server.bench.arrivals import Lengths
from server.bench.load import Load, find_target, measure
from server.bench.run import Target
from server.bench.summary import Summary

CLIENTS = 4
STREAMS = 64
WARM_ROUNDS = 8
STEADY = 1.03
"""Warming up ends with the first round that is not this much faster than the best before it."""
ROUNDS = 4
"""Requests that each stream sends, one when the one before has ended."""
B64 = Load(requests=ROUNDS * STREAMS, inputs=Lengths(512, 512), outputs=Lengths(128, 128), concurrency=STREAMS)


@dataclass(frozen=True, slots=True)
class HttpRates:
    tokens_per_second: float
    """Median of the runs, from the first request to the last end."""
    runs: list[float]
    tokens_per_event: float
    client_limits: list[str]
    """In what respects the client was the limit; empty is good."""


def target_of(server: Server, model: str) -> Target:
    vocab = int(CONFIGS[model]["vocab_size"])
    return find_target(server.url, "random", None, vocab=vocab, temperature=OUTPUT_TEMPERATURE)


def complete_run(target: Target, load: Load, seed: int, slo: dict[str, float] | None = None) -> Summary:
    """Raises RuntimeError where a request failed, KeyboardInterrupt where Ctrl-C ended it."""
    summary, interrupted = measure(target, load, seed, clients=CLIENTS, slo=slo or {})
    if interrupted or summary is None:
        raise KeyboardInterrupt
    if summary.complete < summary.requests:
        raise RuntimeError(f"requests failed: {summary.refused | summary.errors}: {summary.details}")
    return summary


def warm_up(target: Target, load: Load) -> None:
    """Until the server gets no faster: kernels are compiled, graphs captured."""
    best = 0.0
    for seed in range(WARM_ROUNDS):
        rate = complete_run(target, load, seed).output_tokens_per_second
        if rate < STEADY * best:
            return
        best = max(best, rate)


def b64_streams(model: str, dtype: str, repeats: int) -> HttpRates:
    """64 closed-loop streams, 512 tokens in and 128 out."""
    with random_weights_server(model, dtype) as server:
        target = target_of(server, model)
        warm_up(target, B64)
        runs = [complete_run(target, B64, seed) for seed in range(repeats)]
    return HttpRates(
        tokens_per_second=statistics.median(run.output_tokens_per_second for run in runs),
        runs=[run.output_tokens_per_second for run in runs],
        tokens_per_event=statistics.fmean(run.tokens_per_event for run in runs),
        client_limits=[limit for run in runs for limit in run.client.limits],
    )
