"""Latency over HTTP at the request rates of vLLM's table, ours beside vLLM's for the same kind of GPU.

    python -m benchmarks.http_rates --model r1-7b
    python -m benchmarks.http_rates --model r1-1.5b --rates 64 96 --seeds 1

Open-loop Poisson arrivals against ``slimserve serve`` with random weights: 256-768 tokens in and 64-320 out, uniform,
fresh random token ids, at least 500 requests and 20 seconds a seed, three seeds; the median over the seeds counts.
Milliseconds. It writes benchmarks/results/http_rates_GPU.json, merged by model and rate.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks import report, vllm_figures
from benchmarks.http_streams import CLIENTS, target_of, warm_up
from benchmarks.model_configs import CONFIGS
from benchmarks.servers import random_weights_server
from benchmarks.vllm_figures import HttpFigures
from server.bench.load import DEFAULT_INPUTS, DEFAULT_OUTPUTS, Load, measure
from server.bench.run import Target
from server.bench.show import client_lines
from server.bench.summary import P99_FROM, Quantiles, Summary

SECONDS = 20
SLO = {"ttft": 0.2, "tpot": 0.015}
"""What 99 % of the requests must meet at the rate where vLLM breaks down."""
GOOD_SHARE = 0.99
BREAKDOWN = {"r1-1.5b": 96}
"""Requests/s by model at which the targets count, and not the ratios to vLLM's figures."""
WIDTHS = (24, 10, 10, 7, 9, 7)


def load_at(rate: float, requests: int | None) -> Load:
    return Load(
        requests=requests or max(P99_FROM, int(SECONDS * rate)),
        inputs=DEFAULT_INPUTS,
        outputs=DEFAULT_OUTPUTS,
        rate=rate,
    )


@dataclass(frozen=True, slots=True)
class Line:
    """One figure beside vLLM's, in milliseconds."""

    name: str
    ours: float | None
    peer: float | None
    bar: float | None
    """Most of ours over vLLM's."""

    def cells(self) -> list[str]:
        ratio = self.ours / self.peer if self.ours is not None and self.peer else None
        verdict = "-"
        if ratio is not None and self.bar is not None:
            verdict = "met" if ratio <= self.bar else "MISSED"
        return [
            self.name,
            "-" if self.ours is None else f"{self.ours:,.2f}",
            "-" if self.peer is None else f"{self.peer:,.2f}",
            "-" if ratio is None else f"{ratio:.2f}x",
            "-" if self.bar is None else f"<= {self.bar:.2f}x",
            verdict,
        ]


def lines(summaries: Sequence[Summary], peer: HttpFigures | None, model: str) -> Iterator[Line]:
    p50_bar = vllm_figures.P50_BAR.get(model)
    for metric, peers in (("ttft", peer and peer.ttft), ("tpot", peer and peer.tpot), ("gap", peer and peer.gap)):
        median = Quantiles.median([summary.metrics[metric] for summary in summaries])
        values = {"p50": median.p50, "p90": median.p90, "p99": median.p99}
        if metric == "gap":
            del values["p90"]
        bars = {"p50": None if metric == "gap" else p50_bar, "p90": None, "p99": vllm_figures.P99_BAR}
        for index, (name, seconds) in enumerate(values.items()):
            ours = None if seconds is None else seconds * 1000
            yield Line(f"{metric} {name}", ours, peers[index] if peers else None, bars[name] if peers else None)


def show(model: str, rate: float, summaries: Sequence[Summary], peer: HttpFigures | None) -> None:
    beyond = rate == BREAKDOWN.get(model)
    print(f"\n{model} at {rate:g} requests/s, {summaries[0].requests} requests a seed, {len(summaries)} seeds")
    print(report.row(("ms", "ours", "vLLM", "ratio", "bar", "verdict"), WIDTHS))
    for line in lines(summaries, peer, model):
        print(report.row(line.cells(), WIDTHS))
    share = statistics.median(summary.good / summary.requests for summary in summaries)
    verdict = ("met" if share >= GOOD_SHARE else "MISSED") if beyond else "no bar"
    rate_out = statistics.median(summary.output_tokens_per_second for summary in summaries)
    print(f"TTFT <= 200 ms and TPOT <= 15 ms: {share:.2%} of the requests ({verdict}); {rate_out:,.0f} output tokens/s")
    failures = sum(summary.requests - summary.complete for summary in summaries)
    if failures:
        print(f"{failures} requests failed: {[summary.refused | summary.errors for summary in summaries]}")
    print("\n".join(client_lines(summaries)), flush=True)


def run_rate(target: Target, load: Load, seeds: int) -> list[Summary]:
    """Raises KeyboardInterrupt where Ctrl-C ended it."""
    summaries = []
    for seed in range(seeds):
        summary, interrupted = measure(target, load, seed, clients=CLIENTS, slo=SLO)
        if interrupted or summary is None:
            raise KeyboardInterrupt
        summaries.append(summary)
    return summaries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(CONFIGS), default="r1-1.5b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rates", nargs="+", type=float, help="requests/s; default: those of vLLM's table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--requests", type=int, help="a seed and rate")
    parser.add_argument("--output", type=Path, help="folder of the JSON; default benchmarks/results")
    arguments = parser.parse_args()
    facts = report.print_header(f"HTTP rates: {arguments.model} {arguments.dtype}")
    device = report.device_name()
    kind = vllm_figures.gpu_kind(device)
    print(f"  device: {device}")
    peers = {figures.rate: figures for figures in vllm_figures.HTTP.get((kind, arguments.model), ())}
    rates = arguments.rates or list(peers)
    if not rates:
        parser.error(f"there is no table of vLLM's for {arguments.model} on this device; give --rates")
    name = f"http_rates_{kind}"
    with random_weights_server(arguments.model, arguments.dtype) as server:
        target = target_of(server, arguments.model)
        warm_up(target, load_at(max(rates), min(arguments.requests or P99_FROM, 100)))
        for rate in rates:
            summaries = run_rate(target, load_at(rate, arguments.requests), arguments.seeds)
            show(arguments.model, rate, summaries, peers.get(int(rate)))
            old = report.read(name, arguments.output)
            key = f"{arguments.model} {arguments.dtype} {rate:g}/s"
            entry = {"commit": report.commit(), "seeds": msgspec.to_builtins(summaries)}
            path = report.write(name, {**old, "machine": facts, "device": device, key: entry}, arguments.output)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
