"""Tenants, targets and timeouts over real HTTP, on a real server with the fake engine."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest

from benchmarks.http_client import Answer, ask
from benchmarks.tenant_flood import Load, alone_and_flooded, fake_model, server_of_two_tenants
from server.tenants import hash_key
from tests.integration.fake_server import LATE, FakeServer, configuration, fake_server
from tests.metrics_text import metric, wait_until, wait_until_zero

KEY = "a-key-long-enough-for-a-tenant"
OPERATOR = "the-operator-s-key"


def test_a_tenant_that_floods_does_not_make_another_wait(tmp_path: Path) -> None:
    """Nine in ten here, because a test shares its machine; ``benchmarks.tenant_flood`` looks at the 99th percentile."""
    with server_of_two_tenants(tmp_path, fake_model(0.05), max_concurrent=16, max_batch=32) as port:
        load = Load(port, "m", rate=6.0, clients=60, tokens=30)
        alone, flooded = asyncio.run(alone_and_flooded(load, seconds=5))
    assert alone.refused == flooded.refused == 0
    assert flooded.p90 <= 1.5 * alone.p90, (alone, flooded)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[FakeServer]:
    """One stream at a time, 50 ms a step. Fresh each time: a server that has seen streams end predicts how long one
    takes, and refuses at the door what this one lets wait."""
    config = configuration("fake fake_step_seconds=0.05", max_batch=1)
    with fake_server(tmp_path, config) as server:
        yield server


class Answered(NamedTuple):
    response: httpx.Response
    in_the_meantime: bool
    """It came while the stream still ran."""


def while_busy(server: FakeServer, seconds: float, *bodies: dict[str, Any], headers: dict[str, str]) -> list[Answered]:
    """Answers to requests that come while a stream of so many seconds runs, which must end well."""

    async def main() -> list[Answered]:
        tokens = int(seconds / 0.05)
        stream = asyncio.create_task(ask(server.port, server.body(stream=True, max_tokens=tokens)))
        await asyncio.to_thread(wait_until, lambda: metric(server.url, "slimserve_requests_running") == 1)

        async def post(body: dict[str, Any]) -> Answered:
            response = await client.post(f"{server.url}/v1/completions", json=server.body(**body))
            return Answered(response, not stream.done())

        async with httpx.AsyncClient(timeout=60, headers=headers) as client:
            answers = await asyncio.gather(*map(post, bodies))
        first: Answer = await stream
        assert first.complete
        return list(answers)

    return asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_s_timeout_in_the_queue_is_504(slow: FakeServer, stream: bool) -> None:
    # Answers are short here, for all that the door knows, so it lets a client wait for one to end.
    assert slow.complete(max_tokens=1).status_code == 200
    [(answer, in_the_meantime)] = while_busy(slow, 3.0, {"stream": stream}, headers={"X-Request-Timeout-Ms": "500"})
    assert answer.status_code == 504, answer.text
    assert answer.json()["error"]["code"] == "timeout"
    assert in_the_meantime
    assert metric(slow.url, "slimserve_http_refusals_total", reason="timeout") >= 1


def test_a_target_that_must_be_missed_is_503_and_others_are_served(slow: FakeServer) -> None:
    firm = {"slo": {"ttft_ms": 400}}
    (refused, in_the_meantime), (served, _) = while_busy(slow, 3.0, firm, {}, headers={})
    assert in_the_meantime
    assert refused.status_code == 503, refused.text
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert "queue_seconds" in refused.json()["error"]
    assert served.status_code == 200


def test_a_target_within_reach_is_served(slow: FakeServer) -> None:
    answer = slow.complete(slo={"ttft_ms": 2000, "tpot_ms": 200}, priority="high")
    assert answer.status_code == 200


def test_a_target_out_of_reach_is_served_and_told_in_a_metric_and_the_log(slow: FakeServer) -> None:
    assert slow.complete(max_tokens=40).status_code == 200  # its step times are known then
    for _ in range(2):
        answer = slow.complete(max_tokens=20, slo={"tpot_ms": 5})
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 20
    reason = "tpot out of reach"
    wait_until(lambda: metric(slow.url, "slimserve_scheduler_decisions_total", reason=reason) >= 20)
    assert slow.log.count("the target of 5 ms") == 1


def test_a_storm_of_a_thousand_cancels_leaves_nothing_behind(tmp_path: Path) -> None:
    config = configuration("fake fake_step_seconds=0.01")
    with fake_server(tmp_path, config) as server:
        body = server.body(stream=True, max_tokens=1500)
        workers = [worker.pid for worker in server.workers()]

        async def storm() -> float:
            opened = [asyncio.create_task(ask(server.port, body)) for _ in range(1000)]
            await asyncio.to_thread(wait_until, lambda: open_requests(server) == 1000, 30)
            started = time.monotonic()
            for task in opened:
                task.cancel()
            await asyncio.gather(*opened, return_exceptions=True)
            return time.monotonic() - started

        assert asyncio.run(storm()) < 1.5 + LATE
        wait_until(lambda: metric(server.url, "slimserve_requests_total", ending="cancelled") == 1000)
        wait_until_zero(server.url, "slimserve_requests_running", "slimserve_requests_waiting")
        wait_until_zero(server.url, "slimserve_kv_blocks_used")
        assert metric(server.url, "slimserve_integrity_errors_total") == 0
        assert server.complete().status_code == 200
        assert [worker.pid for worker in server.workers()] == workers


def open_requests(server: FakeServer) -> float:
    return sum(metric(server.url, f"slimserve_requests_{state}") for state in ("running", "waiting"))


def test_the_openai_sdk_reads_a_quota_and_sends_targets(tmp_path: Path) -> None:
    entry = {"name": "a", "keys": [hash_key(KEY)], "requests_per_minute": 2, "max_priority": "high"}
    (tmp_path / "tenants.yaml").write_text(json.dumps({"tenants": [entry]}))
    config = configuration("fake", tenants=str(tmp_path / "tenants.yaml"), api_key=OPERATOR)
    with (
        fake_server(tmp_path, config) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        for _ in range(2):
            client.completions.create(
                model="fake", prompt="x", extra_body={"slo": {"ttft_ms": 5000}, "priority": "high"}
            )
        with pytest.raises(openai.RateLimitError) as refusal:
            client.completions.create(model="fake", prompt="x")
        assert refusal.value.code == "rate_limit_exceeded"
        assert refusal.value.response.headers["x-ratelimit-remaining-requests"] == "0"
        assert httpx.get(f"{server.url}/metrics", headers={"authorization": f"Bearer {KEY}"}).status_code == 403
        page = httpx.get(f"{server.url}/metrics", headers={"authorization": f"Bearer {OPERATOR}"}).text
        assert 'slimserve_tenant_requests_total{ending="length",tenant="a"} 2.0' in page
        assert 'slimserve_tenant_refusals_total{reason="quota_requests",tenant="a"} 1.0' in page
