"""The dashboard for whoever asks why: one model's steps, its scheduler's decisions, waste and memory."""

from __future__ import annotations

from grafana.histograms import heatmap, quantiles
from grafana.panel import Dashboard, Panel, Query, Row, Variable
from grafana.promql import mean, of_instance, of_model, rate, share, total

COMPUTED = total(rate(of_model("computed_tokens_total")))


STEPS = Row(
    "Steps",
    (
        quantiles("Time of a step", "step_seconds", "s", "That the device worked on it."),
        quantiles(
            "Time of the scheduler", "scheduler_seconds", "s", "To plan and settle one step; the device works on."
        ),
        Panel(
            title="Steps per second, and the device's share of the time",
            queries=(
                Query(total(rate(of_model("step_seconds_count"))), "steps/s"),
                Query(total(rate(of_model("step_seconds_sum"))), "busy devices"),
            ),
        ),
        heatmap("Sequences in a step", "step_batch_size", "short"),
        heatmap("Tokens in a step", "step_tokens", "short"),
        heatmap("Time between tokens", "inter_token_seconds", "s"),
    ),
)

SCHEDULER = Row(
    "Scheduler",
    (
        Panel(
            title="Decisions by reason",
            width=24,
            height=10,
            text="What each reason tells is in docs/operations.md.",
            queries=(Query(f"{total(rate(of_model('scheduler_decisions_total')), 'reason')} > 0", "{{reason}}"),),
        ),
        Panel(
            title="Error of predicted step times",
            unit="percentunit",
            text="Relative. Above 20 % for long: something else uses the device.",
            queries=(
                Query(f"max({of_model('step_error_p50')})", "p50"),
                Query(f"max({of_model('step_error_p95')})", "p95"),
            ),
        ),
        Panel(
            title="Predicted wait",
            unit="s",
            text="Until a request that comes now would get its first step: what the door reckons with.",
            queries=(Query(f"max({of_model('predicted_wait_seconds')})", "wait"),),
        ),
        Panel(
            title="Token budget of a step",
            queries=(Query(f"max({of_model('token_budget')})", "budget"), Query(mean("step_tokens"), "used")),
        ),
    ),
)

WASTE = Row(
    "Work and waste",
    (
        Panel(
            title="Computed tokens per second",
            queries=(
                Query(COMPUTED, "computed"),
                Query(total(rate(of_model("padded_tokens_total"))), "padding"),
                Query(total(rate(of_model("recomputed_tokens_total"))), "computed again"),
            ),
        ),
        Panel(
            title="Waste",
            unit="percentunit",
            text="Padding: tokens that captured graphs compute for nobody. Recompute: tokens lost by a preemption.",
            queries=(
                Query(share(total(rate(of_model("padded_tokens_total"))), COMPUTED), "padding"),
                Query(share(total(rate(of_model("recomputed_tokens_total"))), COMPUTED), "recompute"),
            ),
        ),
        Panel(
            title="Work per second of the device",
            text="Counted from the model's shape, over the time that steps took: operations, and bytes that it read.",
            queries=(
                Query(
                    share(total(rate(of_model("computed_flops_total"))), total(rate(of_model("step_seconds_sum")))),
                    "operations/s",
                ),
                Query(
                    share(total(rate(of_model("read_bytes_total"))), total(rate(of_model("step_seconds_sum")))),
                    "bytes/s",
                ),
            ),
        ),
    ),
)

CACHE = Row(
    "Memory",
    (
        Panel(
            title="KV blocks",
            queries=(
                Query(total(of_model("kv_blocks_used")), "in use"),
                Query(total(of_model("kv_blocks_cached")), "findable and free"),
                Query(total(of_model("kv_blocks")), "in all"),
            ),
        ),
        Panel(
            title="Prompt tokens by where they came from",
            stacked=True,
            queries=(
                Query(total(rate(of_model("prefix_hit_tokens_total"))), "prefix cache"),
                Query(
                    f"{total(rate(of_model('prefix_query_tokens_total')))} - "
                    f"{total(rate(of_model('prefix_hit_tokens_total')))}",
                    "computed",
                ),
            ),
        ),
        Panel(
            title="Preemptions, and faults of the block pool",
            queries=(
                Query(total(rate(of_model("preemptions_total"))), "preemptions/s"),
                Query(total(of_model("integrity_errors_total")), "faults: anything but 0 is a bug"),
            ),
        ),
        Panel(
            title="Weights and KV cache",
            kind="stat",
            unit="bytes",
            queries=(
                Query(total(of_model("model_weight_bytes")), "weights"),
                Query(total(of_model("model_kv_bytes")), "KV cache"),
            ),
        ),
        Panel(
            title="What the last load took",
            kind="stat",
            unit="s",
            width=16,
            queries=(Query(f"max by (phase) ({of_model('model_load_phase_seconds')})", "{{phase}}"),),
        ),
    ),
)

REQUESTS = Row(
    "Requests",
    (
        quantiles("Queue", "queue_seconds", "s"),
        quantiles("Prefill", "prefill_seconds", "s"),
        quantiles("Decode", "decode_seconds", "s"),
        Panel(
            title="Endings",
            unit="reqps",
            stacked=True,
            queries=(Query(total(rate(of_model("requests_total")), "ending"), "{{ending}}"),),
        ),
        Panel(
            title="Time of a refusal p99",
            unit="s",
            text="At the door. A few milliseconds at most, or the API process is short of CPU.",
            queries=(
                Query(
                    f"histogram_quantile(0.99, sum by (le) ({rate(of_instance('refusal_seconds_bucket'))})) >= 0", "p99"
                ),
            ),
        ),
        Panel(
            title="Replays and strikes",
            text="Requests that went on after a worker's death, and those that were in its last step. In five minutes.",
            queries=(
                Query(f"sum(increase({of_model('replayed_requests_total')}[5m]))", "replayed"),
                Query(f"sum(increase({of_model('strikes_total')}[5m]))", "strikes"),
            ),
        ),
    ),
)

DASHBOARD = Dashboard(
    "slimserve-engine",
    "Slimserve: one engine in depth",
    "One model: steps, decisions of the scheduler, waste, memory, phases of requests.",
    (STEPS, SCHEDULER, WASTE, CACHE, REQUESTS),
    (Variable("model", "slimserve_model_ready", several=False), Variable("instance", "slimserve_build_info")),
)
