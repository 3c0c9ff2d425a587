from __future__ import annotations

import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from engines.protocol import Capacity, EngineInfo, Gpu, LoadPhase, SamplingParams
from server.errors import InternalError, Overloaded
from server.metric_table import TABLE
from server.metrics import Metrics
from server.requests import Reply, Request
from server.worker.wire import EngineLoad, LoadReport, StepStats
from tests.promtool import needs_promtool, promtool


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = [
        sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.name == f"slimserve_{name}" and labels.items() <= sample.labels.items()
    ]
    assert found, name
    return sum(found)


def engine_load(name: str = "m", *, running: int = 0, preemptions: int = 0, used: int = 0) -> EngineLoad:
    return EngineLoad(
        name=name,
        running=running,
        waiting=1,
        waiting_tokens=7,
        blocks_used=used,
        blocks_cached=2,
        blocks_total=100,
        token_budget=512,
        preemptions=preemptions,
        prefix_queries=10 * preemptions,
        prefix_hits=5 * preemptions,
        integrity_errors=0,
    )


def report(incarnation: int, *engines: EngineLoad) -> LoadReport:
    return LoadReport(incarnation=incarnation, steps=1, phase="idle", rss_bytes=1000, engines=list(engines))


def make() -> Metrics:
    return Metrics(["m", "n"], version="9.9")


def reply_of(model: str, tenant: str = "") -> Reply:
    request = Request(0, model, [1, 2, 3], 4, (SamplingParams(seed=1),), arrived=10.0, tenant=tenant)
    reply = Reply(request, lambda _: None)
    reply.deliver(0, 0, [5, 6], "stop", now=10.5)
    return reply


def test_every_series_of_a_known_model_exists_from_the_start() -> None:
    metrics = make()
    page = metrics.render().decode()
    for metric in TABLE:
        assert f"# HELP slimserve_{metric.name}" in page
        if metric.labels == ("model",) and metric.at_zero:
            assert f"slimserve_{metric.name}" in page
    assert value(metrics, "requests_total", model="m", ending="error") == 0
    assert value(metrics, "kv_blocks", model="n") == 0
    assert value(metrics, "build_info", version="9.9") == 1


def test_only_known_models_are_labels() -> None:
    metrics = make()
    metrics.refused("../../etc/passwd", "model_not_found")
    metrics.refused("m", "overloaded")
    assert value(metrics, "http_refusals_total", model="unknown", reason="model_not_found") == 1
    assert value(metrics, "http_refusals_total", model="m", reason="overloaded") == 1
    assert "passwd" not in metrics.render().decode()


def test_tenants_are_counted_apart_and_their_number_is_bounded() -> None:
    names = [f"t{number}" for number in range(150)]
    metrics = Metrics(["m"], version="9.9", tenants=names)
    for name in (*names, "gone"):
        metrics.refused("m", "quota_tokens", name)
        reply = reply_of("m", name)
        metrics.request_ended(reply, "stop", now=12.0)
    assert value(metrics, "tenant_refusals_total", tenant="t0", reason="quota_tokens") == 1
    assert value(metrics, "tenant_refusals_total", tenant="other") == 51
    assert value(metrics, "tenant_tokens_total", tenant="t1", kind="prompt") == 3
    assert value(metrics, "tenant_tokens_total", tenant="t1", kind="output") == 2
    assert value(metrics, "tenant_requests_total", tenant="t1", ending="stop") == 1
    assert value(metrics, "tenant_time_to_first_token_seconds_sum", tenant="t1") == 0.5
    assert "gone" not in metrics.render().decode()


def test_the_nameless_tenant_has_no_series() -> None:
    metrics = make()
    metrics.refused("m", "overloaded")
    metrics.request_ended(reply_of("m"), "stop", now=12.0)
    assert 'tenant="' not in metrics.render().decode()


def test_models_and_tenants_of_a_reload_become_labels() -> None:
    metrics = make()
    metrics.know(["m", "new"], ["t"])
    assert value(metrics, "requests_total", model="new", ending="error") == 0
    metrics.refused("new", "overloaded", "t")
    assert value(metrics, "tenant_refusals_total", tenant="t") == 1
    assert value(metrics, "requests_total", model="m", ending="error") == 0


def test_decisions_of_the_scheduler_are_counted_by_reason_over_restarts() -> None:
    metrics = make()
    first = replace(engine_load(), decisions={"late_drop": 3, "chunk": 1}, recomputed_tokens=5, computed_tokens=50)
    metrics.load_report(0, report(1, first))
    metrics.load_report(0, report(1, replace(first, decisions={"late_drop": 4, "chunk": 1, "new": 2})))
    metrics.worker_gone(0)
    metrics.load_report(0, report(2, replace(first, decisions={"late_drop": 1})))
    assert value(metrics, "scheduler_decisions_total", model="m", reason="late_drop") == 5
    assert value(metrics, "scheduler_decisions_total", model="m", reason="new") == 2
    assert value(metrics, "recomputed_tokens_total", model="m") == 10
    assert value(metrics, "computed_tokens_total", model="m") == 100


def test_predictions_of_several_workers_show_the_worst() -> None:
    metrics = make()
    metrics.load_report(0, report(1, replace(engine_load(), predicted_wait=3.0, step_error_p95=0.1)))
    metrics.load_report(1, report(1, replace(engine_load(), predicted_wait=1.0, step_error_p95=0.2)))
    assert value(metrics, "predicted_wait_seconds", model="m") == 3.0
    assert value(metrics, "step_error_p95", model="m") == 0.2
    metrics.worker_gone(0)
    assert value(metrics, "predicted_wait_seconds", model="m") == 1.0


def test_replays_and_strikes_are_counted() -> None:
    metrics = make()
    metrics.replayed("m", 64)
    metrics.struck("m")
    assert value(metrics, "replayed_requests_total", model="m") == 64
    assert value(metrics, "strikes_total", model="m") == 1


def test_an_ended_request_is_counted_with_its_times() -> None:
    metrics = make()
    metrics.request_ended(reply_of("m"), "stop", now=12.0)
    assert value(metrics, "requests_total", model="m", ending="stop") == 1
    assert value(metrics, "prompt_tokens_total", model="m") == 3
    assert value(metrics, "request_seconds_sum", model="m") == 2.0
    assert value(metrics, "queue_seconds_count", model="m") == 1


def test_the_phases_of_a_request_add_up_to_it() -> None:
    metrics = make()
    reply = reply_of("m")
    reply.queue_seconds = 0.2
    metrics.request_ended(reply, "stop", now=12.0)
    phases = [value(metrics, f"{phase}_seconds_sum", model="m") for phase in ("queue", "prefill", "decode")]
    assert phases == pytest.approx([0.2, 0.3, 1.5])


def test_a_request_that_was_refused_while_it_waited_is_no_error() -> None:
    metrics = make()
    request = Request(0, "m", [1], 4, (SamplingParams(seed=1),), arrived=10.0)
    for error in (Overloaded("late"), InternalError("ours")):
        reply = Reply(request, lambda _: None)
        reply.fail(error)
        metrics.request_ended(reply, "error", now=11.0)
    assert value(metrics, "requests_total", model="m", ending="refused") == 1
    assert value(metrics, "requests_total", model="m", ending="error") == 1


def test_goodput_is_counted_by_class() -> None:
    metrics = make()
    request = Request(
        0, "m", [1], 4, (SamplingParams(seed=1),), arrived=10.0, ttft=1.0, tpot=0.1, firm=True, priority="high"
    )
    met, slow = Reply(request, lambda _: None), Reply(request, lambda _: None)
    for reply in (met, slow):
        reply.deliver(0, 0, [5, 6, 7], "stop", now=10.5)
    metrics.request_ended(met, "stop", now=10.6)
    metrics.request_ended(slow, "stop", now=10.8)
    metrics.turned_away(request)
    metrics.turned_away(Request(0, "m", [1], 4, (SamplingParams(seed=1),), arrived=10.0))
    found = {
        outcome: value(metrics, "slo_requests_total", model="m", priority="high", outcome=outcome)
        for outcome in ("met", "ttft", "tpot", "refused", "error")
    }
    assert found == {"met": 1, "ttft": 0, "tpot": 1, "refused": 1, "error": 0}


def engine_info(gpu: Gpu | None = None) -> EngineInfo:
    return EngineInfo(
        name="m", fingerprint="f", device="cuda:0", dtype="bfloat16", kv_dtype="bfloat16", weight_bytes=100,
        kv_bytes=50, threads=1, load_seconds=3.5, load_phases=(LoadPhase("weights", 3.0),), vocab_size=8, gpu=gpu,
    )  # fmt: skip


def capacity(blocks: int) -> Capacity:
    return Capacity(blocks=blocks, block_size=16, max_rows=4, max_step_tokens=64, max_model_len=128)


def test_a_loaded_model_tells_what_it_took_and_holds() -> None:
    metrics = make()
    metrics.engine_loaded(0, engine_info(), capacity(70))
    metrics.engine_loaded(1, engine_info(), capacity(80))
    assert value(metrics, "model_load_seconds", model="m") == 3.5
    assert value(metrics, "model_load_phase_seconds", model="m", phase="weights") == 3.0
    assert value(metrics, "model_weight_bytes", model="m") == 200
    assert value(metrics, "cache_config_info", model="m", block_size="16", num_gpu_blocks="80") == 1
    assert 'num_gpu_blocks="70"' not in metrics.render().decode()
    metrics.worker_gone(1)
    assert value(metrics, "model_kv_bytes", model="m") == 50


def test_a_peak_is_there_only_where_it_is_known_of_each_replica() -> None:
    metrics = make()
    known = Gpu(name="g", uuid="GPU-1", peak_flops=1e15, peak_bytes=3e12)
    metrics.engine_loaded(0, engine_info(known), capacity(8))
    assert value(metrics, "peak_flops", model="m") == 1e15
    metrics.engine_loaded(1, engine_info(replace(known, peak_flops=None)), capacity(8))
    assert "slimserve_peak_flops{" not in metrics.render().decode()
    assert value(metrics, "peak_bytes_per_second", model="m") == 6e12
    metrics.worker_gone(1)
    assert value(metrics, "peak_flops", model="m") == 1e15


def test_the_share_of_kv_blocks_in_use() -> None:
    metrics = make()
    metrics.load_report(0, report(1, engine_load(used=10)))
    metrics.load_report(1, report(1, engine_load(used=40)))
    assert value(metrics, "kv_cache_usage_ratio", model="m") == 0.25


def test_the_first_restart_and_refusal_are_increases() -> None:
    metrics = make()
    metrics.load_report(3, report(1, engine_load()))
    assert value(metrics, "worker_restarts_total", worker="worker-3", cause="died") == 0
    assert value(metrics, "http_refusals_total", model="m", reason="target") == 0


@needs_promtool
def test_promtool_finds_nothing_to_say() -> None:
    metrics = make()
    metrics.engine_loaded(0, engine_info(Gpu(name="g", uuid="u", peak_flops=1.0, peak_bytes=1.0)), capacity(8))
    metrics.load_report(0, report(1, engine_load()))
    metrics.request_ended(reply_of("m", "t"), "stop", now=12.0)
    answer = promtool("check", "metrics", page=metrics.render())
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_gaps_between_tokens_are_a_prometheus_histogram() -> None:
    metrics = make()
    assert value(metrics, "inter_token_seconds_count", model="n") == 0
    metrics.tokens_delivered("m", 3, {0.01: 1, 0.011: 1})
    metrics.tokens_delivered("m", 1, {99.0: 1})
    assert value(metrics, "generated_tokens_total", model="m") == 4
    assert value(metrics, "inter_token_seconds_count", model="m") == 3
    assert value(metrics, "inter_token_seconds_sum", model="m") == pytest.approx(99.021)
    assert value(metrics, "inter_token_seconds_bucket", model="m", le="0.01") == 1
    assert value(metrics, "inter_token_seconds_bucket", model="m", le="0.015") == 2
    assert value(metrics, "inter_token_seconds_bucket", model="m", le="10.0") == 2
    assert value(metrics, "inter_token_seconds_bucket", model="m", le="+Inf") == 3


def test_buckets_start_at_a_millisecond_or_below() -> None:
    for metric in TABLE:
        if metric.name.endswith("_seconds") and metric.kind == "histogram":
            assert metric.buckets[0] <= 0.001, metric.name
            assert list(metric.buckets) == sorted(set(metric.buckets))


def test_gauges_sum_over_workers_and_go_with_them() -> None:
    metrics = make()
    metrics.load_report(0, report(1, engine_load(running=3, used=10), engine_load("n", running=1)))
    metrics.load_report(1, report(1, engine_load(running=4, used=20)))
    assert value(metrics, "requests_running", model="m") == 7
    assert value(metrics, "kv_blocks_used", model="m") == 30
    assert value(metrics, "process_memory_bytes", process="worker-1") == 1000
    metrics.worker_gone(0)
    assert value(metrics, "requests_running", model="m") == 4
    assert value(metrics, "requests_running", model="n") == 0
    assert value(metrics, "process_memory_bytes", process="worker-0") == 0


def test_counters_grow_on_over_a_restart_of_the_worker() -> None:
    metrics = make()
    metrics.load_report(0, report(1, engine_load(preemptions=5)))
    metrics.load_report(0, report(1, engine_load(preemptions=7)))
    metrics.worker_gone(0)
    metrics.worker_restarted(0, "died")
    metrics.load_report(0, report(2, engine_load(preemptions=2)))
    assert value(metrics, "preemptions_total", model="m") == 9
    assert value(metrics, "prefix_hit_tokens_total", model="m") == 45
    assert value(metrics, "worker_restarts_total", worker="worker-0") == 1


def test_a_step_is_observed() -> None:
    metrics = make()
    sizes = {"rows": 8, "tokens": 40, "prompt_tokens": 32, "padding": 3}
    metrics.step("m", StepStats(seconds=0.02, plan_seconds=0.0001, flops=1e9, bytes_read=5e6, **sizes))
    assert value(metrics, "padded_tokens_total", model="m") == 3
    assert value(metrics, "computed_flops_total", model="m") == 1e9
    assert value(metrics, "read_bytes_total", model="m") == 5e6
    assert value(metrics, "step_batch_size_sum", model="m") == 8
    assert value(metrics, "step_tokens_sum", model="m") == 40
    assert value(metrics, "scheduler_seconds_sum", model="m") == 0.0001


def test_two_servers_in_one_process_do_not_share_numbers() -> None:
    first, second = make(), make()
    first.worker_restarted(0, "silent")
    assert value(first, "worker_restarts_total", worker="worker-0", cause="silent") == 1
    assert "worker-0" not in second.render().decode()
