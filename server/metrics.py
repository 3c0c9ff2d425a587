"""The object that the rest of the server counts with."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from engines.protocol import End
from server.metric_table import TABLE, Metric
from server.requests import Reply
from server.worker.wire import EngineLoad, LoadReport, StepStats

UNKNOWN = "unknown"
MAX_TENANTS = 100
"""Tenants with series of their own; those beyond are counted together as ``OTHER``."""
OTHER = "other"

# Field of EngineLoad -> name of the metric
_GAUGES = {
    "running": "requests_running",
    "waiting": "requests_waiting",
    "blocks_used": "kv_blocks_used",
    "blocks_cached": "kv_blocks_cached",
    "blocks_total": "kv_blocks_total",
    "token_budget": "token_budget",
}
_LARGEST = {
    "predicted_wait": "predicted_wait_seconds",
    "step_error_p50": "step_error_p50",
    "step_error_p95": "step_error_p95",
}
"""Gauges that say nothing when added up over workers."""
_COUNTERS = {
    "preemptions": "preemptions",
    "prefix_queries": "prefix_query_tokens",
    "prefix_hits": "prefix_hit_tokens",
    "integrity_errors": "integrity_errors",
    "computed_tokens": "computed_tokens",
    "recomputed_tokens": "recomputed_tokens",
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

    def __init__(self, known_models: Iterable[str], *, version: str, tenants: Iterable[str] = ()) -> None:
        self._registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for metric in TABLE:
            self._register(metric)
        self._known: frozenset[str] = frozenset()
        self._tenants: frozenset[str] = frozenset()
        self._reports: dict[int, LoadReport] = {}
        self._gauges["build_info"].labels(version).set(1)
        self.know(known_models, tenants)
        self._process = psutil.Process()

    def know(self, models: Iterable[str], tenants: Iterable[str] = ()) -> None:
        """What may be a label from now on, beside what was before."""
        new = frozenset(models) - self._known
        self._known |= new
        for model in new:
            self._show_at_zero(model)
        fresh = [tenant for tenant in tenants if tenant not in self._tenants]
        self._tenants |= frozenset(fresh[: MAX_TENANTS - len(self._tenants)])

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

    def _tenant_label(self, tenant: str) -> str:
        return tenant if tenant in self._tenants else OTHER

    # --- requests

    def refused(self, model: str, reason: str, tenant: str = "", seconds: float | None = None) -> None:
        """``reason`` is that of one of our own errors, never a client's text. The nameless tenant is not counted.

        ``seconds`` since the arrival of a request that was refused at the door; None for one that had waited.
        """
        if seconds is not None:
            self._histograms["refusal_seconds"].observe(seconds)
        self._counters["http_refusals"].labels(self._label(model), reason).inc()
        if tenant:
            self._counters["tenant_refusals"].labels(self._tenant_label(tenant), reason).inc()

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
        if request.tenant:
            self._tenant_ended(reply, ending)

    def _tenant_ended(self, reply: Reply, ending: End) -> None:
        request, tenant = reply.request, self._tenant_label(reply.request.tenant)
        self._counters["tenant_requests"].labels(tenant, ending).inc()
        self._counters["tenant_tokens"].labels(tenant, "prompt").inc(len(request.prompt))
        self._counters["tenant_tokens"].labels(tenant, "output").inc(sum(len(log.tokens) for log in reply.logs))
        if reply.first_token_at is not None:
            waited = reply.first_token_at - request.arrived
            self._histograms["tenant_time_to_first_token_seconds"].labels(tenant).observe(waited)

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
            self._count_growth(load, known.get(load.name))
            self._refresh_gauges(load.name)

    def _count_growth(self, load: EngineLoad, before: EngineLoad | None) -> None:
        for field, name in _COUNTERS.items():
            grown = getattr(load, field) - (0 if before is None else getattr(before, field))
            self._counters[name].labels(load.name).inc(max(0, grown))
        for reason, count in load.decisions.items():
            grown = count - (0 if before is None else before.decisions.get(reason, 0))
            self._counters["scheduler_decisions"].labels(load.name, reason).inc(max(0, grown))

    def worker_gone(self, worker: int) -> None:
        """Its gauges go; its counters stay. Its next life counts from 0 again."""
        report = self._reports.pop(worker, None)
        self._gauges["process_memory_bytes"].labels(f"worker-{worker}").set(0)
        for load in () if report is None else report.engines:
            self._refresh_gauges(load.name)

    def worker_restarted(self, worker: int, cause: str) -> None:
        """``cause``: one of ``server.worker.watch.Cause``."""
        self._counters["worker_restarts"].labels(f"worker-{worker}", cause).inc()

    def replayed(self, model: str, requests: int = 1) -> None:
        """Open requests of a lost worker that go on elsewhere."""
        self._counters["replayed_requests"].labels(self._label(model)).inc(requests)

    def struck(self, model: str, requests: int = 1) -> None:
        """Requests that were in the step at which a worker died and had made no progress since they last were."""
        self._counters["strikes"].labels(self._label(model)).inc(requests)

    def model_ready(self, model: str, ready: bool) -> None:
        self._gauges["model_ready"].labels(model).set(ready)

    def _refresh_gauges(self, model: str) -> None:
        loads = [load for report in self._reports.values() for load in report.engines if load.name == model]
        for field, name in _GAUGES.items():
            self._gauges[name].labels(model).set(sum(getattr(load, field) for load in loads))
        for field, name in _LARGEST.items():
            self._gauges[name].labels(model).set(max((getattr(load, field) for load in loads), default=0.0))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        self._gauges["process_memory_bytes"].labels("api").set(self._process.memory_info().rss)
        return generate_latest(self._registry)
