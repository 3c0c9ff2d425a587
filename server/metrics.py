"""The object that the rest of the server counts with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import get_args

import psutil

from engines.protocol import Capacity, End, EngineInfo
from server.metric_families import Families
from server.requests import Reply, Request
from server.slo import OUTCOMES, Outcome, has_target, outcome, was_refused
from server.worker.watch import Cause
from server.worker.wire import EngineLoad, LoadReport, StepStats

UNKNOWN = "unknown"
MAX_TENANTS = 100
"""Tenants with series of their own; those beyond are counted together as ``OTHER``."""
OTHER = "other"
CAPACITY_REASONS = ("target", "late", "predicted_wait", "queue_full", "tokens_waiting", "timeout")
"""Refusals that more capacity would prevent. Their series exist from the start: the first one is an increase."""

REFUSED = "refused"
"""Ending of a request that waited until it was refused, beside those of ``End``."""

# Field of EngineLoad -> name of the metric
_GAUGES = {
    "running": "requests_running",
    "waiting": "requests_waiting",
    "blocks_used": "kv_blocks_used",
    "blocks_cached": "kv_blocks_cached",
    "blocks_total": "kv_blocks",
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


class Metrics:
    """All numbers of the server. Models that are not served appear as ``unknown``, so labels stay bounded."""

    def __init__(self, known_models: Iterable[str], *, version: str, tenants: Iterable[str] = ()) -> None:
        self.families = Families()
        self._counters = self.families.counters
        self._gauges = self.families.gauges
        self._histograms = self.families.histograms
        self._known: frozenset[str] = frozenset()
        self._tenants: frozenset[str] = frozenset()
        self._reports: dict[int, LoadReport] = {}
        self._loaded: dict[tuple[int, str], EngineInfo] = {}
        self._block_shapes: dict[str, tuple[str, str, str]] = {}
        self._restartable: set[int] = set()
        self._gauges["build_info"].labels(version).set(1)
        self._gauges["drain_start_time_seconds"].set(0)
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

    def _show_at_zero(self, model: str) -> None:
        self.families.show_at_zero(model)
        for ending in (*get_args(End)[1:], REFUSED):
            self._counters["requests"].labels(model, ending)
        for reason in CAPACITY_REASONS:
            self._counters["http_refusals"].labels(model, reason)

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

    def turned_away(self, request: Request) -> None:
        """At the door: one that had a target has missed it."""
        if has_target(request):
            self._count_outcome(request, "refused")

    def first_token(self, model: str, seconds: float) -> None:
        """``seconds`` since the request arrived."""
        self._histograms["time_to_first_token_seconds"].labels(self._label(model)).observe(seconds)

    def answered(self, reply: Reply, step_seconds: float, now: float) -> None:
        """A one-shot request's step gave it all that it gets."""
        request = reply.request
        model = self._label(request.model)
        self._counters["infer_rows"].labels(model).inc(request.rows)
        self._histograms["infer_queue_seconds"].labels(model).observe(reply.queue_seconds)
        self._histograms["infer_step_seconds"].labels(model).observe(step_seconds)
        if request.tenant:
            self._counters["tenant_rows"].labels(self._tenant_label(request.tenant)).inc(request.rows)

    def tokens_delivered(self, model: str, tokens: int, gaps: Mapping[float, int]) -> None:
        """Of one step: output tokens, and how often which time in seconds was between one and the token before it."""
        self._counters["generated_tokens"].labels(model).inc(tokens)
        self.families.gaps.observe(model, gaps)

    def request_ended(self, reply: Reply, ending: End, now: float) -> None:
        request = reply.request
        model, label = self._label(request.model), REFUSED if was_refused(reply) else ending
        self._counters["requests"].labels(model, label).inc()
        self._counters["prompt_tokens"].labels(model).inc(len(request.prompt))
        self._histograms["request_seconds"].labels(model).observe(now - request.arrived)
        if reply.first_token_at is not None:
            prefill = reply.first_token_at - request.arrived - reply.queue_seconds
            self._histograms["queue_seconds"].labels(model).observe(reply.queue_seconds)
            self._histograms["prefill_seconds"].labels(model).observe(max(0.0, prefill))
            self._histograms["decode_seconds"].labels(model).observe(now - reply.first_token_at)
        met = outcome(reply, ending, now)
        if met is not None:
            self._count_outcome(request, met)
        if request.tenant:
            self._tenant_ended(reply, label)

    def _count_outcome(self, request: Request, happened: Outcome) -> None:
        for each in OUTCOMES:
            child = self._counters["slo_requests"].labels(self._label(request.model), request.priority, each)
            if each == happened:
                child.inc()

    def _tenant_ended(self, reply: Reply, ending: str) -> None:
        request, tenant = reply.request, self._tenant_label(reply.request.tenant)
        self._counters["tenant_requests"].labels(tenant, ending).inc()
        self._counters["tenant_tokens"].labels(tenant, "prompt").inc(len(request.prompt))
        self._counters["tenant_tokens"].labels(tenant, "output").inc(sum(len(log.tokens) for log in reply.logs))
        if reply.first_token_at is not None:
            waited = reply.first_token_at - request.arrived
            self._histograms["tenant_time_to_first_token_seconds"].labels(tenant).observe(waited)

    # --- workers

    def step(self, model: str, stats: StepStats) -> None:
        """Called once a step, whatever its size."""
        self._histograms["step_batch_size"].labels(model).observe(stats.rows)
        self._histograms["step_tokens"].labels(model).observe(stats.tokens)
        self._histograms["step_seconds"].labels(model).observe(stats.seconds)
        self._histograms["scheduler_seconds"].labels(model).observe(stats.plan_seconds)
        if stats.padding:
            self._counters["padded_tokens"].labels(model).inc(stats.padding)
        if stats.flops:
            self._counters["computed_flops"].labels(model).inc(stats.flops)
            self._counters["read_bytes"].labels(model).inc(stats.bytes_read)

    def load_report(self, worker: int, report: LoadReport) -> None:
        """Gauges follow the report; counters grow by what the worker counted since its last one."""
        last = self._reports.get(worker)
        known = {} if last is None else {load.name: load for load in last.engines}
        self._reports[worker] = report
        self._gauges["process_memory_bytes"].labels(f"worker-{worker}").set(report.rss_bytes)
        for cause in () if worker in self._restartable else get_args(Cause):
            self._counters["worker_restarts"].labels(f"worker-{worker}", cause)
        self._restartable.add(worker)
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
        for key in [key for key in self._loaded if key[0] == worker]:
            del self._loaded[key]
            self._refresh_model(key[1])

    def worker_restarted(self, worker: int, cause: Cause) -> None:
        self._counters["worker_restarts"].labels(f"worker-{worker}", cause).inc()

    def replayed(self, model: str, requests: int = 1) -> None:
        """Open requests of a lost worker that go on elsewhere."""
        self._counters["replayed_requests"].labels(self._label(model)).inc(requests)

    def struck(self, model: str, requests: int = 1) -> None:
        """Requests that were in the step at which a worker died and had made no progress since they last were."""
        self._counters["strikes"].labels(self._label(model)).inc(requests)

    # --- models

    def model_ready(self, model: str, ready: bool) -> None:
        self._gauges["model_ready"].labels(model).set(ready)

    def engine_loaded(self, worker: int, info: EngineInfo, capacity: Capacity) -> None:
        """A replica of a model can serve: what its load took, and what it holds."""
        self._loaded[worker, info.name] = info
        self._gauges["model_load_seconds"].labels(info.name).set(info.load_seconds)
        for phase in info.load_phases:
            self._gauges["model_load_phase_seconds"].labels(info.name, phase.name).set(phase.seconds)
        self._show_blocks(info.name, capacity)
        self._refresh_model(info.name)

    def _show_blocks(self, model: str, capacity: Capacity) -> None:
        shape = (model, str(capacity.block_size), str(capacity.blocks))
        former = self._block_shapes.get(model, shape)
        if former != shape:
            self._gauges["cache_config_info"].remove(*former)
        self._block_shapes[model] = shape
        self._gauges["cache_config_info"].labels(*shape).set(1)

    def _refresh_model(self, model: str) -> None:
        """Over all replicas. A peak is known only where that of each replica's device is."""
        infos = [info for (_, name), info in self._loaded.items() if name == model]
        self._gauges["model_weight_bytes"].labels(model).set(sum(info.weight_bytes for info in infos))
        self._gauges["model_kv_bytes"].labels(model).set(sum(info.kv_bytes for info in infos))
        flops = [None if info.gpu is None else info.gpu.peak_flops for info in infos]
        speeds = [None if info.gpu is None else info.gpu.peak_bytes for info in infos]
        self._set_if_known("peak_flops", model, flops)
        self._set_if_known("peak_bytes_per_second", model, speeds)

    def _set_if_known(self, name: str, model: str, parts: list[float | None]) -> None:
        known = [part for part in parts if part is not None]
        if known and len(known) == len(parts):
            self._gauges[name].labels(model).set(sum(known))
        else:
            with contextlib.suppress(KeyError):
                self._gauges[name].remove(model)

    def _refresh_gauges(self, model: str) -> None:
        loads = [load for report in self._reports.values() for load in report.engines if load.name == model]
        for field, name in _GAUGES.items():
            self._gauges[name].labels(model).set(sum(getattr(load, field) for load in loads))
        for field, name in _LARGEST.items():
            self._gauges[name].labels(model).set(max((getattr(load, field) for load in loads), default=0.0))
        total = sum(load.blocks_total for load in loads)
        used = sum(load.blocks_used for load in loads)
        self._gauges["kv_cache_usage_ratio"].labels(model).set(used / total if total else 0.0)

    # --- the server

    def grace(self, seconds: float) -> None:
        """How long a drain may take."""
        self._gauges["grace_seconds"].set(seconds)

    def drain_began(self, unix_time: float) -> None:
        self._gauges["drain_start_time_seconds"].set(unix_time)

    def parts(self) -> Iterator[bytes]:
        """The text that Prometheus reads, a family at a time: whoever has streams to feed can do so in between."""
        self._gauges["process_memory_bytes"].labels("api").set(self._process.memory_info().rss)
        yield from self.families.parts()

    def render(self) -> bytes:
        """All of it."""
        return b"".join(self.parts())
