"""What the dashboard is told, against what was counted."""

from __future__ import annotations

from typing import Any

from engines.manifest import Manifest
from server.api.routes import create_api
from server.api.state import ApiState, ModelState, ReadyState
from server.gpu_metrics import GpuMetrics
from server.nvml import GpuSample
from server.worker.wire import EngineLoad, LoadReport, StepStats
from tests.unit.api.harness import ScriptedDispatcher, call, make_state, post
from tests.unit.api.test_callers import ask, make, table


def read(state: ApiState) -> Any:
    answer = call(create_api(state), ("GET", "/stats", None))[0]
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    return answer.json()


def test_a_model_at_rest_is_all_zeros(manifest: Manifest) -> None:
    found = read(make_state(manifest, ScriptedDispatcher()))
    assert (found["time"], found["version"], found["ready"], found["gpus"]) == (100.0, "1.2.3", True, [])
    (model,) = found["models"]
    assert (model["name"], model["state"], model["max_model_len"]) == ("tiny", "ready", 256)
    assert model["generated_tokens"] == model["kv_usage"] == 0
    for name in ("ttft", "gap", "latency", "batch", "step"):
        assert len(model[name]["counts"]) == len(model[name]["bounds"]) + 1
        assert set(model[name]["counts"]) == {0.0}


def test_numbers_are_those_of_the_metrics(manifest: Manifest) -> None:
    state = make_state(manifest, ScriptedDispatcher())
    metrics = state.metrics
    metrics.tokens_delivered("tiny", 5, {0.02: 4})
    metrics.first_token("tiny", 0.3)
    metrics.refused("tiny", "queue_full")
    metrics.step("tiny", StepStats(seconds=0.01, plan_seconds=0.001, rows=3, tokens=9, prompt_tokens=0))
    load = EngineLoad(
        name="tiny",
        running=2,
        waiting=1,
        waiting_tokens=7,
        blocks_used=25,
        blocks_cached=1,
        blocks_total=100,
        token_budget=512,
        preemptions=0,
        prefix_queries=0,
        prefix_hits=0,
        integrity_errors=0,
        predicted_wait=0.5,
    )
    metrics.load_report(0, LoadReport(incarnation=1, steps=1, phase="step", rss_bytes=1000, engines=[load]))
    found = read(state)
    (model,) = found["models"]
    assert (model["running"], model["waiting"], model["kv_usage"], model["predicted_wait"]) == (2, 1, 0.25, 0.5)
    assert model["generated_tokens"] == 5
    assert (model["gap"]["counts"][-1], model["gap"]["sum"]) == (4, 0.08)
    assert model["ttft"]["counts"][model["ttft"]["bounds"].index(0.5)] == 1
    assert model["ttft"]["counts"][model["ttft"]["bounds"].index(0.25)] == 0
    assert (model["batch"]["sum"], model["batch"]["counts"][-1]) == (3, 1)
    assert model["refusals"]["queue_full"] == 1
    assert found["worker_memory"] == {"worker-0": 1000}


def test_a_model_that_loads_tells_how_far_it_is(manifest: Manifest) -> None:
    loading = ModelState(name="tiny", state="loading", phase="read", done=3, total=10)
    state = make_state(manifest, ScriptedDispatcher(), ready=lambda: ReadyState(True, False, (loading,)))
    found = read(state)
    (model,) = found["models"]
    assert not found["ready"]
    assert (model["state"], model["phase"], model["done"], model["total"]) == ("loading", "read", 3, 10)


def test_of_a_gpu_only_what_the_driver_tells(manifest: Manifest) -> None:
    state = make_state(manifest, ScriptedDispatcher())
    families = state.metrics.families
    families.gauges["gpu_info"].labels("cuda:0", "NVIDIA H100", "GPU-1", "570").set(1)
    sample = GpuSample(
        utilization=0.9, sm_active=None, memory_bandwidth=None, memory_used=5.0, memory_total=80.0, power=300.0,
        temperature=None, energy=None,
    )  # fmt: skip
    GpuMetrics(families).show("cuda:0", sample)
    (gpu,) = read(state)["gpus"]
    assert (gpu["gpu"], gpu["name"], gpu["utilization"], gpu["power"]) == ("cuda:0", "NVIDIA H100", 0.9, 300.0)
    assert gpu["sm_active"] is gpu["temperature"] is None


def test_the_traffic_of_all_is_the_operators(manifest: Manifest) -> None:
    state = make(manifest, table())
    assert ask(state, "GET", "/stats", "operator").status_code == 200
    assert ask(state, "GET", "/stats", "a").status_code == 403


def test_names_of_tenants_are_nowhere(manifest: Manifest) -> None:
    state = make_state(manifest, ScriptedDispatcher(lambda *_: "abc"), tenants=table())
    ask(state, "POST", "/v1/completions", "a", json={"model": "tiny", "prompt": "x"})
    assert "tenant" not in ask(state, "GET", "/stats", "operator").text


def test_post_is_refused(manifest: Manifest) -> None:
    assert post(make_state(manifest, ScriptedDispatcher()), "/stats").status_code == 405
