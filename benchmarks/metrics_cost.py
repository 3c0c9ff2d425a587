"""What a ``/metrics`` page costs the API process, and what one scrape a second does to the steps beside it.

    python -m benchmarks.metrics_cost

The page is rendered in this process from as many series as a served model on a GPU with tenants has. The server renders
it part by part, between what its streams need of the event loop, so what holds them up is the longest part. The steps
are those of a fake engine that feeds so many streams; in turns of some seconds the page is read once a second, or not
at all, and the time from step to step is compared. Exits with 1 where a page takes 5 ms or steps are 1 % slower.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks import report
from benchmarks.api_events import client
from benchmarks.metrics_page import parse
from benchmarks.servers import free_port, running, slimserve
from engines.protocol import Capacity, EngineInfo, Gpu, LoadPhase, SamplingParams
from server.gpu_metrics import GpuMetrics
from server.metrics import Metrics
from server.nvml import GpuSample
from server.requests import Reply, Request
from server.worker.wire import EngineLoad, LoadReport

PAGE_BAR, STEP_BAR = 0.005, 1.01
"""Seconds of a page; steps with scrapes over steps without."""
STEP_SECONDS = 0.01
TENANTS = 8
DECISIONS = 40
"""Reasons that a busy scheduler has given."""


def full_metrics() -> Metrics:
    """With a series for all that a server of one model on one GPU tells."""
    tenants = [f"tenant-{number}" for number in range(TENANTS)]
    metrics = Metrics(["m"], version="0", tenants=tenants)
    load = EngineLoad(
        name="m", running=64, waiting=3, waiting_tokens=99, blocks_used=999, blocks_cached=9, blocks_total=9999,
        token_budget=512, preemptions=1, prefix_queries=5, prefix_hits=2, integrity_errors=0,
        decisions={f"reason {number}": number + 1 for number in range(DECISIONS)},
    )  # fmt: skip
    metrics.load_report(0, LoadReport(incarnation=1, steps=1, phase="step", rss_bytes=1, engines=[load]))
    gpu = Gpu(name="g", uuid="u", peak_flops=1e15, peak_bytes=3e12)
    phases = tuple(LoadPhase(f"phase {number}", 1.0) for number in range(8))
    info = EngineInfo(
        name="m", fingerprint="f", device="cuda:0", dtype="bfloat16", kv_dtype="bfloat16", weight_bytes=1, kv_bytes=1,
        threads=1, load_seconds=1.0, load_phases=phases, vocab_size=8, gpu=gpu,
    )  # fmt: skip
    metrics.engine_loaded(0, info, Capacity(blocks=9, block_size=16, max_rows=4, max_step_tokens=64, max_model_len=99))
    for tenant in tenants:
        request = Request(0, "m", [1], 4, (SamplingParams(seed=1),), arrived=0.0, tenant=tenant, ttft=1.0)
        reply = Reply(request, lambda _: None)
        reply.deliver(0, 0, [1, 2], "stop", now=0.5)
        metrics.request_ended(reply, "stop", now=1.0)
        metrics.refused("m", "late", tenant, 0.001)
    gpus = GpuMetrics(metrics.families)
    gpus.show("cuda:0", GpuSample(**dict.fromkeys(GpuSample.__slots__, 1.0)))
    gpus.close()
    return metrics


def page_seconds(metrics: Metrics, repeats: int = 200) -> float:
    """Median, of this thread's CPU time: what else the machine does has no part in it."""
    times = []
    for _ in range(repeats):
        began = time.thread_time()
        metrics.render()
        times.append(time.thread_time() - began)
    return statistics.median(times)


def longest_part_seconds(metrics: Metrics, repeats: int = 50) -> float:
    """What the server does of a page before it looks whether streams wait: the longest of all parts, the median of
    some pages."""
    longest = []
    for _ in range(repeats):
        times, began = [], time.thread_time()
        for _ in metrics.parts():
            now = time.thread_time()
            times.append(now - began)
            began = now
        longest.append(max(times))
    return statistics.median(longest)


def step_interval(port: int, seconds: float, *, scrape: bool) -> float:
    """Seconds from step to step over a turn, which begins and ends with a look at the counter."""
    first, began = _steps(port), time.perf_counter()
    while (left := seconds - (time.perf_counter() - began)) > 0:
        time.sleep(min(1.0, left))
        if scrape:
            _steps(port)
    return (time.perf_counter() - began) / (_steps(port) - first)


def _steps(port: int) -> float:
    page = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).raise_for_status().text
    return parse(page).value("step_seconds_count")


def compare_steps(streams: int, turns: int, seconds: float) -> tuple[list[float], list[float]]:
    """Intervals without and with scrapes, in pairs."""
    port, tokens = free_port(), int((2 * turns * seconds + 20) / STEP_SECONDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "config.yaml"
        entry = f"{{name: fake, kind: fake, fake_step_seconds: {STEP_SECONDS}, max_model_len: {tokens + 64}}}"
        config.write_text(f"models:\n  - {entry}\n")
        command = slimserve("serve", "--config", str(config), "--port", str(port))
        with running("slimserve", command, port, "/health/ready", log=folder / "log"):
            results: multiprocessing.Queue[tuple[int, int]] = multiprocessing.Queue()
            clients = multiprocessing.Process(target=client, args=(port, streams, tokens, 0, results))
            clients.start()
            try:
                time.sleep(3)
                without: list[float] = []
                scraped: list[float] = []
                for turn in range(turns):
                    for scrape in (False, True) if turn % 2 else (True, False):
                        (scraped if scrape else without).append(step_interval(port, seconds, scrape=scrape))
            finally:
                clients.kill()
                clients.join()
    return without, scraped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5, help="of a turn")
    arguments = parser.parse_args()
    facts = report.print_header("Cost of /metrics")
    metrics = full_metrics()
    page = page_seconds(metrics)
    without, scraped = compare_steps(arguments.streams, arguments.turns, arguments.seconds)
    ratio = statistics.median(scraped) / statistics.median(without)
    figures: dict[str, object] = {
        "page_ms": round(page * 1e3, 3),
        "longest_part_ms": round(longest_part_seconds(metrics) * 1e3, 3),
        "page_lines": metrics.render().count(b"\n"),
        "streams": arguments.streams,
        "step_ms_without": [round(each * 1e3, 3) for each in without],
        "step_ms_scraped": [round(each * 1e3, 3) for each in scraped],
        "step_ratio": round(ratio, 4),
    }
    for key, value in figures.items():
        print(f"{key}: {value}")
    path = report.write(
        "metrics_cost", {"machine": facts, **figures, "page_bar_ms": PAGE_BAR * 1e3, "ratio_bar": STEP_BAR}
    )
    print(f"written to {path.relative_to(report.ROOT)}")
    sys.exit(1 if page >= PAGE_BAR or ratio > STEP_BAR else 0)


if __name__ == "__main__":
    main()
