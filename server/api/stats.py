"""GET /stats: what the live dashboard shows, read from the server's own metrics.

Counters and distributions count since the server started; whoever wants a rate takes the difference of two answers and
divides by that of their ``time``. ``/metrics`` has all of it and more, for Prometheus.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from fastapi import Request
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from starlette.responses import Response

from server.api.body import api_state
from server.api.state import ApiState, ModelState, ServedModel
from server.gpu_metrics import GPU_GAUGES
from server.metric_families import Families


class Distribution(msgspec.Struct, frozen=True):
    """A histogram: ``counts[i]`` of all were at most ``bounds[i]``, and the last count is that of all."""

    bounds: list[float]
    counts: list[float]
    sum: float


class ModelStats(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    state: str
    phase: str
    done: int
    """Bytes of the load's phase, or 0 where it has no measure; as is ``total``."""
    total: int
    reason: str
    device: str
    dtype: str
    """Of weights and activations; empty before the first load, like ``device``."""
    max_model_len: int
    weight_bytes: float
    kv_bytes: float
    running: float
    """Sequences that take part in steps."""
    waiting: float
    kv_usage: float
    """KV blocks that a live request refers to, of all; 0 to 1."""
    token_budget: float
    """Most tokens that a step computes now."""
    predicted_wait: float
    """Seconds until a request that comes now would be given its first step."""
    generated_tokens: float
    computed_tokens: float
    """Prompt and output together."""
    prefix_query_tokens: float
    prefix_hit_tokens: float
    preemptions: float
    endings: dict[str, float]
    """Requests by how they ended."""
    refusals: dict[str, float]
    """Requests refused without an answer, by reason."""
    ttft: Distribution
    """Seconds from arrival to the first token."""
    gap: Distribution
    """Seconds between two tokens of one choice."""
    latency: Distribution
    """Seconds from arrival to the ending."""
    batch: Distribution
    """Sequences in one step."""
    step: Distribution
    """Seconds that the device worked on one step."""


class GpuStats(msgspec.Struct, frozen=True, kw_only=True):
    """Null is what the driver does not tell. Shares are 0 to 1."""

    gpu: str
    name: str
    utilization: float | None
    sm_active: float | None
    memory_bandwidth: float | None
    memory_used: float | None
    memory_total: float | None
    power: float | None
    temperature: float | None


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    time: float
    """Seconds of the server's monotonic clock."""
    version: str
    ready: bool
    models: list[ModelStats]
    gpus: list[GpuStats]
    worker_memory: dict[str, float]
    """Resident bytes of each worker process."""


_NOTHING = Distribution([], [], 0.0)

# Field of ModelStats -> name of the metric
_GAUGES = {
    "weight_bytes": "model_weight_bytes",
    "kv_bytes": "model_kv_bytes",
    "running": "requests_running",
    "waiting": "requests_waiting",
    "kv_usage": "kv_cache_usage_ratio",
    "token_budget": "token_budget",
    "predicted_wait": "predicted_wait_seconds",
}
_COUNTERS = {
    "generated_tokens": "generated_tokens",
    "computed_tokens": "computed_tokens",
    "prefix_query_tokens": "prefix_query_tokens",
    "prefix_hit_tokens": "prefix_hit_tokens",
    "preemptions": "preemptions",
}
_DISTRIBUTIONS = {
    "ttft": "time_to_first_token_seconds",
    "latency": "request_seconds",
    "batch": "step_batch_size",
    "step": "step_seconds",
}


async def stats(request: Request) -> Response:
    body = msgspec.json.encode(read_stats(api_state(request)))
    return Response(body, headers={"cache-control": "no-store"}, media_type="application/json")


def read_stats(state: ApiState) -> Stats:
    """Of all models that are served now."""
    now = state.ready()
    memory = _by_label(state.metrics.families.gauges["process_memory_bytes"], "process")
    return Stats(
        time=state.clock(),
        version=state.version,
        ready=now.ready,
        models=_models(state, now.models),
        gpus=_gpus(state.metrics.families),
        worker_memory={name: used for name, used in memory.items() if name.startswith("worker-")},
    )


def _models(state: ApiState, models: tuple[ModelState, ...]) -> list[ModelStats]:
    families = state.metrics.families
    numbers = {field: _by_label(families.gauges[name], "model") for field, name in _GAUGES.items()}
    numbers |= {field: _by_label(families.counters[name], "model") for field, name in _COUNTERS.items()}
    shapes = {field: _distributions(families.histograms[name]) for field, name in _DISTRIBUTIONS.items()}
    shapes["gap"] = _distributions(families.gaps)
    parts = {
        "endings": _parts(families.counters["requests"], "ending"),
        "refusals": _parts(families.counters["http_refusals"], "reason"),
    }
    found = []
    for model in models:
        name = model.name
        fields: dict[str, Any] = {field: values.get(name, 0.0) for field, values in numbers.items()}
        fields |= {field: values.get(name, _NOTHING) for field, values in shapes.items()}
        fields |= {field: values.get(name, {}) for field, values in parts.items()}
        served = state.models.get(name)
        found.append(
            ModelStats(
                name=name,
                state=model.state,
                phase=model.phase,
                done=model.done,
                total=model.total,
                reason=model.reason,
                device=model.device,
                dtype=model.dtype,
                max_model_len=served.max_model_len if isinstance(served, ServedModel) else 0,
                **fields,
            )
        )
    return found


def _gpus(families: Families) -> list[GpuStats]:
    values = {field: _by_label(families.gauges[name], "gpu") for field, name in GPU_GAUGES.items()}
    return [
        GpuStats(
            gpu=sample.labels["gpu"],
            name=sample.labels["name"],
            **{field: known.get(sample.labels["gpu"]) for field, known in values.items()},
        )
        for sample in _samples(families.gauges["gpu_info"])
    ]


def _samples(family: Collector) -> Iterator[Sample]:
    for metric in family.collect():
        yield from metric.samples


def _by_label(family: Collector, label: str) -> dict[str, float]:
    return {sample.labels[label]: sample.value for sample in _samples(family)}


def _parts(family: Collector, label: str) -> dict[str, dict[str, float]]:
    """Of each model: values by another label."""
    found: dict[str, dict[str, float]] = {}
    for sample in _samples(family):
        found.setdefault(sample.labels["model"], {})[sample.labels[label]] = sample.value
    return found


def _distributions(family: Collector) -> dict[str, Distribution]:
    found: dict[str, Distribution] = {}
    for sample in _samples(family):
        model = sample.labels["model"]
        shape = found.setdefault(model, Distribution([], [], 0.0))
        if sample.name.endswith("_sum"):
            found[model] = msgspec.structs.replace(shape, sum=sample.value)
        elif (edge := sample.labels.get("le")) is not None:
            shape.counts.append(sample.value)
            if edge != "+Inf":
                shape.bounds.append(float(edge))
    return found
