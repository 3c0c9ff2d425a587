"""Every metric's name, kind, labels and buckets in one table, and the object that the rest of the server talks to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from engines.protocol import End
from server.requests import Reply
from server.worker.wire import LoadReport, StepStats

UNKNOWN = "unknown"

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_GAP = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
_SCHEDULER = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25)
_POWERS = tuple(float(2**power) for power in range(15))


@dataclass(frozen=True, slots=True)
class Metric:
    kind: Literal["counter", "gauge", "histogram"]
    name: str
    """Without the prefix ``slimserve_``; counters get ``_total`` behind it."""
    help: str
    labels: tuple[str, ...] = ("model",)
    buckets: tuple[float, ...] = ()


TABLE: tuple[Metric, ...] = (
    Metric("counter", "requests", "Requests by ending: stop, length, cancelled, error.", ("model", "ending")),
    Metric("counter", "http_refusals", "Requests refused before they reached a model, by reason.", ("model", "reason")),
    Metric("gauge", "requests_running", "Sequences that take part in steps."),
    Metric("gauge", "requests_waiting", "Sequences that wait for their first step."),
    Metric("histogram", "time_to_first_token_seconds", "From arrival to the first token.", buckets=_LATENCY),
    Metric("histogram", "inter_token_seconds", "Between two tokens of one choice.", buckets=_TOKEN_GAP),
    Metric("histogram", "request_seconds", "From arrival to the ending.", buckets=_LATENCY),
    Metric("histogram", "queue_seconds", "From arrival to the first step.", buckets=_LATENCY),
    Metric("counter", "prompt_tokens", "Prompt tokens of ended requests."),
    Metric("counter", "generated_tokens", "Output tokens delivered."),
    Metric("counter", "prefix_query_tokens", "Prompt tokens looked up in the prefix cache."),
    Metric("counter", "prefix_hit_tokens", "Prompt tokens found in the prefix cache."),
    Metric("counter", "preemptions", "Sequences that lost their KV blocks and were computed again."),
    Metric("gauge", "kv_blocks_used", "KV blocks that a live request refers to."),
    Metric("gauge", "kv_blocks_cached", "KV blocks that can be found again and are free to reuse."),
    Metric("gauge", "kv_blocks_total", "KV blocks of the model."),
    Metric("gauge", "token_budget", "Most tokens that a step computes now."),
    Metric("counter", "integrity_errors", "Faults that the block pool's own check found; anything but 0 is a bug."),
    Metric("histogram", "step_batch_size", "Sequences in one step.", buckets=_POWERS[:11]),
    Metric("histogram", "step_tokens", "Tokens computed in one step, prompt and output together.", buckets=_POWERS),
    Metric("histogram", "step_seconds", "Time that the device worked on one step.", buckets=_TOKEN_GAP),
    Metric("histogram", "scheduler_seconds", "Time to plan and settle one step.", buckets=_SCHEDULER),
    Metric("gauge", "model_ready", "1 when a request for the model would be served."),
    Metric("counter", "worker_restarts", "Starts of a worker process after the first.", ("worker",)),
    Metric("gauge", "process_memory_bytes", "Resident memory of the API process and of each worker.", ("process",)),
    Metric("gauge", "build_info", "1; the version is in the label.", ("version",)),
)

# Field of EngineLoad -> name of the metric
_GAUGES = {
    "running": "requests_running",
    "waiting": "requests_waiting",
    "blocks_used": "kv_blocks_used",
    "blocks_cached": "kv_blocks_cached",
    "blocks_total": "kv_blocks_total",
    "token_budget": "token_budget",
}
_COUNTERS = {
    "preemptions": "preemptions",
    "prefix_queries": "prefix_query_tokens",
    "prefix_hits": "prefix_hit_tokens",
    "integrity_errors": "integrity_errors",
}


class TokenGaps(Collector):
    """The histogram that every token passes: a tenth of what the library's own costs per observation."""

    NAME = "inter_token_seconds"

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text = name, text
        self._bounds = tuple(bounds)
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, model: str, gaps: Sequence[float]) -> None:
        counts = self._counts.setdefault(model, [0] * (len(self._bounds) + 1))
        for gap in gaps:
            counts[bisect_left(self._bounds, gap)] += 1
        self._sums[model] = self._sums.get(model, 0.0) + sum(gaps)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """What the registry asks for."""
        family = HistogramMetricFamily(self._name, self._text, labels=("model",))
        edges = [*map(floatToGoString, self._bounds), "+Inf"]
        for model, counts in self._counts.items():
            buckets = list(zip(edges, map(float, accumulate(counts)), strict=True))
            family.add_metric((model,), buckets, self._sums[model])
        yield family


class Metrics:
    """All numbers of the server. Models that are not served appear as ``unknown``, so labels stay bounded."""

    def __init__(self, known_models: Iterable[str], *, version: str) -> None:
        self._registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for metric in TABLE:
            self._register(metric)
        self._known = frozenset(known_models)
        self._reports: dict[int, LoadReport] = {}
        self._gauges["build_info"].labels(version).set(1)
        for model in self._known:
            self._show_at_zero(model)
        self._process = psutil.Process()

    def _register(self, metric: Metric) -> None:
        name, text, labels = f"slimserve_{metric.name}", metric.help, metric.labels
        match metric.kind:
            case "counter":
                self._counters[metric.name] = Counter(name, text, labels, registry=self._registry)
            case "gauge":
                self._gauges[metric.name] = Gauge(name, text, labels, registry=self._registry)
            case "histogram" if metric.name == TokenGaps.NAME:
                self._gaps = TokenGaps(name, text, metric.buckets)
                self._registry.register(self._gaps)
            case "histogram":
                self._histograms[metric.name] = Histogram(
                    name, text, labels, registry=self._registry, buckets=metric.buckets
                )

    def _show_at_zero(self, model: str) -> None:
        """A series that exists from the start: rates over its first increase are right."""
        for metric in TABLE:
            if metric.name == TokenGaps.NAME:
                self._gaps.observe(model, ())
            elif metric.labels == ("model",):
                (self._counters | self._gauges | self._histograms)[metric.name].labels(model)
        for ending in ("stop", "length", "cancelled", "error"):
            self._counters["requests"].labels(model, ending)

    def _label(self, model: str) -> str:
        return model if model in self._known else UNKNOWN

    # --- requests

    def refused(self, model: str, reason: str) -> None:
        """``reason`` is the code or type of one of our own errors, never a client's text."""
        self._counters["http_refusals"].labels(self._label(model), reason).inc()

    def first_token(self, model: str, seconds: float) -> None:
        """``seconds`` since the request arrived."""
        self._histograms["time_to_first_token_seconds"].labels(self._label(model)).observe(seconds)

    def tokens_delivered(self, model: str, tokens: int, gaps: Sequence[float]) -> None:
        """Of one step: output tokens, and the seconds between each and the one before it, for all that had one."""
        self._counters["generated_tokens"].labels(model).inc(tokens)
        self._gaps.observe(model, gaps)

    def request_ended(self, reply: Reply, ending: End, now: float) -> None:
        request = reply.request
        model = self._label(request.model)
        self._counters["requests"].labels(model, ending).inc()
        self._counters["prompt_tokens"].labels(model).inc(len(request.prompt))
        self._histograms["request_seconds"].labels(model).observe(now - request.arrived)
        if reply.first_token_at is not None:
            self._histograms["queue_seconds"].labels(model).observe(reply.queue_seconds)

    # --- workers

    def step(self, model: str, stats: StepStats) -> None:
        self._histograms["step_batch_size"].labels(model).observe(stats.rows)
        self._histograms["step_tokens"].labels(model).observe(stats.tokens)
        self._histograms["step_seconds"].labels(model).observe(stats.seconds)
        self._histograms["scheduler_seconds"].labels(model).observe(stats.plan_seconds)

    def load_report(self, worker: int, report: LoadReport) -> None:
        """Gauges follow the report; counters grow by what the worker counted since its last one."""
        last = self._reports.get(worker)
        known = {} if last is None else {load.name: load for load in last.engines}
        self._reports[worker] = report
        self._gauges["process_memory_bytes"].labels(f"worker-{worker}").set(report.rss_bytes)
        for load in report.engines:
            before = known.get(load.name)
            for field, name in _COUNTERS.items():
                grown = getattr(load, field) - (0 if before is None else getattr(before, field))
                self._counters[name].labels(load.name).inc(max(0, grown))
            self._refresh_gauges(load.name)

    def worker_gone(self, worker: int) -> None:
        """Its gauges go; its counters stay. Its next life counts from 0 again."""
        report = self._reports.pop(worker, None)
        self._gauges["process_memory_bytes"].labels(f"worker-{worker}").set(0)
        for load in () if report is None else report.engines:
            self._refresh_gauges(load.name)

    def worker_restarted(self, worker: int) -> None:
        self._counters["worker_restarts"].labels(f"worker-{worker}").inc()

    def model_ready(self, model: str, ready: bool) -> None:
        self._gauges["model_ready"].labels(model).set(ready)

    def _refresh_gauges(self, model: str) -> None:
        loads = [load for report in self._reports.values() for load in report.engines if load.name == model]
        for field, name in _GAUGES.items():
            self._gauges[name].labels(model).set(sum(getattr(load, field) for load in loads))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        self._gauges["process_memory_bytes"].labels("api").set(self._process.memory_info().rss)
        return generate_latest(self._registry)
