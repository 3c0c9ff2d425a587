"""Every metric's name, kind, labels and buckets in one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_SHORT = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.025, 0.1, 1.0)
_TOKEN_GAP = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
_SCHEDULER = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25)
_SHORT_TO_LONG = (0.0001, 0.00025, 0.0005, *_LATENCY[:12])
_POWERS = tuple(float(2**power) for power in range(15))


@dataclass(frozen=True, slots=True)
class Metric:
    kind: Literal["counter", "gauge", "histogram"]
    name: str
    """Without the prefix ``slimserve_``; counters get ``_total`` behind it."""
    help: str
    labels: tuple[str, ...] = ("model",)
    buckets: tuple[float, ...] = ()
    at_zero: bool = True
    """Of a model's metric: it has a series before anything is known."""


TABLE: tuple[Metric, ...] = (
    Metric("counter", "requests", "Requests by ending: stop, length, cancelled, error, refused.", ("model", "ending")),
    Metric("counter", "http_refusals", "Requests refused without an answer, by reason.", ("model", "reason")),
    Metric("histogram", "refusal_seconds", "From arrival to a refusal at the door.", (), _SHORT),
    Metric("gauge", "requests_running", "Sequences that take part in steps."),
    Metric("gauge", "requests_waiting", "Sequences that wait for their first step."),
    Metric("histogram", "time_to_first_token_seconds", "From arrival to the first token.", buckets=_LATENCY),
    Metric("histogram", "inter_token_seconds", "Between two tokens of one choice.", buckets=_TOKEN_GAP),
    Metric("histogram", "request_seconds", "From arrival to the ending.", buckets=_LATENCY),
    Metric("histogram", "queue_seconds", "From the scheduler's queue to the first step.", buckets=_LATENCY),
    Metric("histogram", "prefill_seconds", "From the first step to the first token.", buckets=_LATENCY),
    Metric("histogram", "decode_seconds", "From the first token to the ending.", buckets=_LATENCY),
    Metric("counter", "infer_rows", "Rows of plain models that were computed for a request."),
    Metric(
        "histogram",
        "infer_queue_seconds",
        "From the scheduler's queue to the step, of a plain model's request.",
        buckets=_SHORT_TO_LONG,
    ),
    Metric(
        "histogram", "infer_step_seconds", "Of the step that computed a plain model's request.", buckets=_SHORT_TO_LONG
    ),
    Metric(
        "counter",
        "slo_requests",
        "Requests that had a target, by what became of it: met, ttft or tpot (missed), refused, error.",
        ("model", "priority", "outcome"),
    ),
    Metric("counter", "prompt_tokens", "Prompt tokens of ended requests."),
    Metric("counter", "generated_tokens", "Output tokens delivered."),
    Metric("counter", "prefix_query_tokens", "Prompt tokens looked up in the prefix cache."),
    Metric("counter", "prefix_hit_tokens", "Prompt tokens found in the prefix cache."),
    Metric("counter", "preemptions", "Sequences that lost their KV blocks and were computed again."),
    Metric("gauge", "kv_blocks_used", "KV blocks that a live request refers to."),
    Metric("gauge", "kv_blocks_cached", "KV blocks that can be found again and are free to reuse."),
    Metric("gauge", "kv_blocks", "KV blocks of the model."),
    Metric("gauge", "kv_cache_usage_ratio", "KV blocks in use, of all; 0 to 1."),
    Metric(
        "gauge",
        "cache_config_info",
        "1; size and number of the KV blocks are in the labels, as the Gateway API Inference Extension reads them.",
        ("model", "block_size", "num_gpu_blocks"),
    ),
    Metric("gauge", "token_budget", "Most tokens that a step computes now."),
    Metric("counter", "integrity_errors", "Faults that the block pool's own check found; anything but 0 is a bug."),
    Metric("histogram", "step_batch_size", "Sequences in one step.", buckets=_POWERS[:11]),
    Metric("histogram", "step_tokens", "Tokens computed in one step, prompt and output together.", buckets=_POWERS),
    Metric("histogram", "step_seconds", "Time that the device worked on one step.", buckets=_TOKEN_GAP),
    Metric("histogram", "scheduler_seconds", "Time to plan and settle one step.", buckets=_SCHEDULER),
    Metric("gauge", "model_ready", "1 when a request for the model would be served."),
    Metric("gauge", "model_load_seconds", "What the last load of the model took."),
    Metric("gauge", "model_load_phase_seconds", "The same by phase of the load.", ("model", "phase")),
    Metric("gauge", "model_weight_bytes", "Weights of the model, over its replicas."),
    Metric("gauge", "model_kv_bytes", "KV cache of the model, over its replicas."),
    Metric("counter", "worker_restarts", "Starts of a worker process after the first.", ("worker", "cause")),
    Metric("counter", "replayed_requests", "Open requests of a lost worker that went on elsewhere."),
    Metric("counter", "strikes", "Requests that were in the step at which a worker died, without progress since."),
    Metric("gauge", "process_memory_bytes", "Resident memory of the API process and of each worker.", ("process",)),
    Metric("counter", "scheduler_decisions", "Decisions of the scheduler, by reason.", ("model", "reason")),
    Metric("counter", "computed_tokens", "Tokens computed, prompt and output together."),
    Metric("counter", "recomputed_tokens", "Of those: computed once before, and lost by a preemption."),
    Metric("counter", "padded_tokens", "Tokens computed for nobody, because captured graphs have fixed sizes."),
    Metric("counter", "computed_flops", "Operations of the model, counted from its shape."),
    Metric("counter", "read_bytes", "Weights and KV that steps had to read at least, counted from the model's shape."),
    Metric(
        "gauge",
        "peak_flops",
        "Operations per second of the model's GPUs in its 16-bit dtype by their data sheets; absent where unknown.",
        at_zero=False,
    ),
    Metric(
        "gauge",
        "peak_bytes_per_second",
        "What the model's GPUs read from memory at most by their data sheets; absent where unknown.",
        at_zero=False,
    ),
    Metric("gauge", "predicted_wait_seconds", "Until a request that comes now would get its first step; the longest."),
    Metric("gauge", "step_error_p50", "Relative error of predicted step times of late, median; the largest."),
    Metric("gauge", "step_error_p95", "The same, 95th percentile."),
    Metric("counter", "tenant_requests", "Requests of a tenant by ending.", ("tenant", "ending")),
    Metric("counter", "tenant_refusals", "Refused requests of a tenant, by reason.", ("tenant", "reason")),
    Metric("counter", "tenant_rows", "Rows of plain models that were computed for a tenant.", ("tenant",)),
    Metric("counter", "tenant_tokens", "Tokens of ended requests: prompt, output.", ("tenant", "kind")),
    Metric(
        "histogram",
        "tenant_time_to_first_token_seconds",
        "From arrival to the first token.",
        ("tenant",),
        (0.001, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
    ),
    Metric("gauge", "gpu_info", "1; which GPU it is.", ("gpu", "name", "uuid", "driver")),
    Metric("gauge", "gpu_utilization_ratio", "Share of the last second in which a kernel ran.", ("gpu",)),
    Metric("gauge", "gpu_sm_active_ratio", "Share of the multiprocessors that were busy.", ("gpu",)),
    Metric("gauge", "gpu_memory_bandwidth_ratio", "Memory traffic, of what the memory can do.", ("gpu",)),
    Metric("gauge", "gpu_memory_used_bytes", "Memory of the GPU in use, by all programs.", ("gpu",)),
    Metric("gauge", "gpu_memory_total_bytes", "Memory of the GPU.", ("gpu",)),
    Metric("gauge", "gpu_power_watts", "Power that the GPU draws.", ("gpu",)),
    Metric("counter", "gpu_energy_joules", "Energy that the GPU took since the server watches it.", ("gpu",)),
    Metric("gauge", "gpu_temperature_celsius", "Temperature of the GPU.", ("gpu",)),
    Metric("gauge", "grace_seconds", "How long open requests may take when the server is stopped.", ()),
    Metric("gauge", "drain_start_time_seconds", "Unix time at which the server was told to stop; 0 before.", ()),
    Metric("gauge", "build_info", "1; the version is in the label.", ("version",)),
)
