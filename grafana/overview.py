"""The dashboard that an operator has open: is all well, and where is it not?"""

from __future__ import annotations

from grafana import promql
from grafana.histograms import heatmap, quantiles
from grafana.panel import Dashboard, Panel, Query, Row, Variable
from grafana.promql import mean, of_instance, of_model, quantile, rate, share, total

REQUESTS = total(rate(of_model("requests_total")))
SERVED = of_model("slo_requests_total", 'outcome="met"')
ASKED = of_model("slo_requests_total")
CACHED = share(
    total(rate(of_model("prefix_hit_tokens_total")), "model"),
    total(rate(of_model("prefix_query_tokens_total")), "model"),
)
VARIABLES = (Variable("model", "slimserve_model_ready"), Variable("instance", "slimserve_build_info"))


def stat(
    title: str, query: str, unit: str = "short", limits: tuple[float, float] | None = None, text: str = ""
) -> Panel:
    return Panel(
        title=title, queries=(Query(query),), kind="stat", unit=unit, limits=limits, text=text, width=3, height=4
    )


NOW = Row(
    "Now",
    (
        stat("Requests", REQUESTS, "reqps"),
        stat("Prompt tokens/s", total(rate(of_model("prompt_tokens_total")))),
        stat("Output tokens/s", total(rate(of_model("generated_tokens_total")))),
        stat(
            "Errors",
            share(total(rate(of_model("requests_total", 'ending="error"'))), REQUESTS),
            "percentunit",
            (0.01, 0.05),
            "Share of requests that ended with an error. A stream's HTTP status says 200 before that.",
        ),
        stat("First token p95", quantile(0.95, "time_to_first_token_seconds"), "s"),
        stat("Between tokens p95", quantile(0.95, "inter_token_seconds"), "s"),
        stat("Whole answer p95", quantile(0.95, "request_seconds"), "s"),
        stat("Targets down", f'count(up{{job="slimserve",{promql.INSTANCE}}} == 0) or vector(0)', limits=(1, 1)),
        stat("Models that serve", total(of_model("model_ready"))),
        stat("Running", total(of_model("requests_running")), text="Sequences that take part in steps."),
        stat("Waiting", total(of_model("requests_waiting")), text="Sequences that wait for their first step."),
        stat("KV in use", f"max({of_model('kv_cache_usage_ratio')})", "percentunit", (0.9, 0.95)),
        stat("Preemptions/s", total(rate(of_model("preemptions_total"))), limits=(0.1, 1)),
        stat(
            "Targets met", share(total(rate(SERVED)), total(rate(ASKED))), "percentunit", text="Of requests with one."
        ),
        stat("Goodput", total(rate(SERVED)), "reqps", text="Requests per second that met all their targets."),
        stat("Refused/s", total(rate(of_model("http_refusals_total"))), "reqps", (0.1, 1)),
    ),
)

MODELS = Row(
    "Models",
    (
        Panel(
            title="Models",
            kind="table",
            width=24,
            height=6,
            queries=(
                Query(f"max by (model) ({of_model('model_ready')})", "ready"),
                Query(total(rate(of_model("requests_total")), "model"), "requests/s"),
                Query(total(rate(of_model("generated_tokens_total")), "model"), "output tokens/s"),
                Query(total(of_model("requests_running"), "model"), "running"),
                Query(total(of_model("requests_waiting"), "model"), "waiting"),
                Query(quantile(0.95, "time_to_first_token_seconds", "model"), "first token p95 (s)"),
                Query(quantile(0.95, "inter_token_seconds", "model"), "between tokens p95 (s)"),
                Query(f"max by (model) ({of_model('kv_cache_usage_ratio')})", "KV in use"),
                Query(CACHED, "prompt from cache"),
            ),
        ),
    ),
)

LATENCY = Row(
    "Latency",
    (
        quantiles("Time to the first token", "time_to_first_token_seconds", "s"),
        quantiles("Time between tokens", "inter_token_seconds", "s"),
        quantiles("Whole answer", "request_seconds", "s"),
        Panel(
            title="Mean time per phase",
            unit="s",
            stacked=True,
            width=12,
            text="Queue, prefill and decode of ended requests, one above the other.",
            queries=[Query(mean(f"{phase}_seconds"), phase) for phase in ("queue", "prefill", "decode")],
        ),
        heatmap("Time to the first token, as a heatmap", "time_to_first_token_seconds", "s", width=12),
    ),
)

LOAD = Row(
    "Batches",
    (
        Panel(
            title="Batch size",
            queries=(
                Query(mean("step_batch_size", "model"), "{{model}} mean"),
                Query(quantile(0.99, "step_batch_size", "model"), "{{model}} p99"),
            ),
        ),
        Panel(
            title="Tokens in a step, and how many it may have",
            queries=(
                Query(mean("step_tokens", "model"), "{{model}} mean"),
                Query(f"max by (model) ({of_model('token_budget')})", "{{model}} budget"),
            ),
        ),
        Panel(
            title="Running and waiting",
            queries=(
                Query(total(of_model("requests_running"), "model"), "{{model}} running"),
                Query(total(of_model("requests_waiting"), "model"), "{{model}} waiting"),
            ),
        ),
        Panel(
            title="Targets met, by class",
            unit="percentunit",
            largest=1,
            queries=(Query(share(total(rate(SERVED), "priority"), total(rate(ASKED), "priority")), "{{priority}}"),),
        ),
        Panel(
            title="Requests with a target, by what became of them",
            unit="reqps",
            stacked=True,
            text="met is goodput; ttft and tpot name the target that was missed.",
            queries=(Query(total(rate(ASKED), "outcome"), "{{outcome}}"),),
        ),
        Panel(
            title="Tokens per second",
            stacked=True,
            queries=(
                Query(total(rate(of_model("prompt_tokens_total"))), "prompt"),
                Query(total(rate(of_model("generated_tokens_total"))), "output"),
            ),
        ),
    ),
)

CACHE = Row(
    "KV and prefix cache",
    (
        Panel(
            title="KV blocks in use",
            unit="percentunit",
            largest=1,
            limits=(0.9, 0.95),
            width=12,
            queries=(
                Query(f"max by (model, instance) ({of_model('kv_cache_usage_ratio')})", "{{model}} {{instance}}"),
            ),
        ),
        Panel(
            title="Prompt tokens from the prefix cache",
            unit="percentunit",
            largest=1,
            width=12,
            queries=(Query(CACHED, "{{model}}"),),
        ),
    ),
)

GPUS = Row(
    "GPUs",
    (
        Panel(
            title="How busy the GPUs are",
            unit="percentunit",
            largest=1,
            text="Utilisation only means that some kernel ran. Multiprocessors and memory traffic are measured by the "
            "GPU's performance monitor, from Hopper on; where the driver does not offer it there is no line.",
            queries=(
                Query(of_instance("gpu_utilization_ratio"), "{{gpu}} utilisation"),
                Query(of_instance("gpu_sm_active_ratio"), "{{gpu}} multiprocessors"),
                Query(of_instance("gpu_memory_bandwidth_ratio"), "{{gpu}} memory traffic"),
            ),
        ),
        Panel(
            title="Share of the peak",
            unit="percentunit",
            text="MFU: operations of the model, counted from its shape, over what the GPU's data sheet says of its "
            "16-bit dtype. MBU: bytes that the steps had to read, over its memory bandwidth. Both of wall time.",
            queries=(
                Query(
                    share(
                        total(rate(of_model("computed_flops_total")), "model"), total(of_model("peak_flops"), "model")
                    ),
                    "{{model}} MFU",
                ),
                Query(
                    share(
                        total(rate(of_model("read_bytes_total")), "model"),
                        total(of_model("peak_bytes_per_second"), "model"),
                    ),
                    "{{model}} MBU",
                ),
            ),
        ),
        Panel(
            title="GPU memory",
            unit="bytes",
            queries=(
                Query(of_instance("gpu_memory_used_bytes"), "{{gpu}} used"),
                Query(of_instance("gpu_memory_total_bytes"), "{{gpu}} in all"),
            ),
        ),
        Panel(title="Power", unit="watt", queries=(Query(of_instance("gpu_power_watts"), "{{gpu}}"),)),
        Panel(title="Temperature", unit="celsius", queries=(Query(of_instance("gpu_temperature_celsius"), "{{gpu}}"),)),
        Panel(
            title="Energy of an output token",
            unit="joule",
            text="Of all GPUs that models are on, prefill and idle time counted in.",
            queries=(
                Query(
                    share(
                        total(rate(of_instance("gpu_energy_joules_total"))),
                        total(rate(of_instance("generated_tokens_total"))),
                    ),
                    "joules",
                ),
            ),
        ),
    ),
)

TROUBLE = Row(
    "Refusals and restarts",
    (
        Panel(
            title="Refusals by reason",
            unit="reqps",
            stacked=True,
            queries=(Query(total(rate(of_model("http_refusals_total")), "reason"), "{{reason}}"),),
        ),
        Panel(
            title="Restarts of workers",
            queries=(
                Query(f"sum by (cause) (increase({of_instance('worker_restarts_total')}[5m]))", "{{cause}}"),
                Query(f"sum(increase({of_model('replayed_requests_total')}[5m]))", "requests that went on"),
            ),
            text="In the last five minutes.",
        ),
        Panel(
            title="Memory of the processes",
            unit="bytes",
            queries=(Query(of_instance("process_memory_bytes"), "{{process}} {{instance}}"),),
        ),
    ),
)

DASHBOARD = Dashboard(
    "slimserve-overview",
    "Slimserve: overview",
    "All models and servers: load, latency, targets, memory, GPUs, refusals.",
    (NOW, MODELS, LATENCY, LOAD, CACHE, GPUS, TROUBLE),
    VARIABLES,
)
