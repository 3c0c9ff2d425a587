"""Logs and traces of a real server process: JSON lines as they were written, spans as a collector gets them."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.servers import slimserve
from tests.integration.fake_server import FakeServer, configuration, fake_server, streams, wait_until

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
SECRET = "a prompt that is nobody's business"


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP and keeps what came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), CollectorHandler)
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []

    def spans(self) -> dict[str, Any]:
        """By name; of two with one name the last."""
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        found: dict[str, Any] = {}
        for body in list(self.bodies):
            message = ExportTraceServiceRequest.FromString(body)
            for resource in message.resource_spans:
                for scope in resource.scope_spans:
                    found |= {span.name: span for span in scope.spans}
        return found

    def resource(self) -> dict[str, str]:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        message = ExportTraceServiceRequest.FromString(self.bodies[0])
        return {each.key: each.value.string_value for each in message.resource_spans[0].resource.attributes}


class CollectorHandler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        self.server.headers.append(dict(self.headers))
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: pytest shows stderr."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def stopped(server: FakeServer) -> None:
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_spans_of_a_stream_reach_a_collector(tmp_path: Path, collector: Collector) -> None:
    pytest.importorskip("opentelemetry.sdk")
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    settings = {
        "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=ours",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
    }
    config = configuration("fake fake_step_seconds=0.01")
    with fake_server(tmp_path, config, "--otlp-endpoint", endpoint, environment=settings) as server:
        headers = {"traceparent": PARENT, "x-request-id": "mine-1"}
        body = server.body(stream=True, max_tokens=20)
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers) as response:
            assert response.headers["x-request-id"] == "mine-1"
            assert response.read().endswith(b"data: [DONE]\n\n")
        wait_until(lambda: "POST /v1/completions" in collector.spans(), "the spans")
        spans = collector.spans()
        assert spans.keys() == {
            *("parse", "admission", "dispatch", "queue", "prefill", "decode", "respond"),
            *("text_completion fake", "POST /v1/completions"),
        }
        assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
        root, decode = spans["POST /v1/completions"], spans["decode"]
        assert root.parent_span_id.hex() == "b7ad6b7169203331"
        for span in spans.values():
            assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
            assert span.end_time_unix_nano <= root.end_time_unix_nano
        # Nineteen more steps of ten milliseconds each.
        assert (decode.end_time_unix_nano - decode.start_time_unix_nano) / 1e9 >= 0.15
        usage = {each.key: each.value.int_value for each in spans["text_completion fake"].attributes}
        assert (usage["gen_ai.usage.input_tokens"], usage["gen_ai.usage.output_tokens"]) == (3, 20)
        assert collector.headers[0]["x-tenant"] == "ours"
        assert collector.resource()["service.name"] == "slimserve"
        assert collector.resource()["deployment.environment.name"] == "test"
        # The last ones leave before the server does.
        before = len(collector.bodies)
        server.complete()
        stopped(server)
        assert len(collector.bodies) > before


def test_a_collector_that_is_not_there_harms_nobody(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk")
    with fake_server(tmp_path, configuration("fake"), "--otlp-endpoint", "http://127.0.0.1:9") as server:
        assert server.complete().status_code == 200
        stopped(server)


def test_all_that_a_server_writes_is_an_object_a_line(tmp_path: Path) -> None:
    config = configuration("fake fake_step_seconds=0.01")
    with fake_server(tmp_path, config, "--log-format", "json", "--log-level", "debug") as server:
        answer = httpx.post(
            f"{server.url}/v1/completions",
            json=server.body(prompt=[7, 8, 9], stop=[SECRET], max_tokens=5),
            headers={"x-request-id": "mine-1"},
        )
        assert answer.status_code == 200
        refused = httpx.post(f"{server.url}/v1/chat/completions", json={"model": SECRET, "messages": []})
        assert refused.status_code == 400
        prompted = httpx.post(f"{server.url}/v1/completions", json=server.body(prompt=SECRET), timeout=30)
        assert prompted.status_code == 200
        assert httpx.get(f"{server.url}/v1/models", params={"note": SECRET}).status_code == 200
        with streams(server, 1, max_tokens=1000):
            pass  # left
        wait_until(lambda: '"status":200' in server.log and "cancelled" in server.log, "the lines")
        stopped(server)
        lines = [json.loads(line) for line in server.log.splitlines()]
    assert "nobody" not in server.log
    assert all({"time", "level", "event", "message", "process", "pid"} <= line.keys() for line in lines)
    assert {line["process"] for line in lines} == {"api", "worker"}
    by_event = {line["event"]: line for line in lines}
    assert {"phase", "loaded", "ready", "request"} <= by_event.keys()
    assert by_event["ready"]["url"] == server.url
    found = {line["request_id"]: line for line in lines if line["event"] == "request"}
    mine = found["mine-1"]
    assert (mine["path"], mine["status"], mine["model"]) == ("/v1/completions", 200, "fake")
    assert (mine["prompt_tokens"], mine["output_tokens"], mine["finish_reasons"]) == (3, 5, ["length"])
    parts = mine["ttft_seconds"], mine["decode_seconds"], mine["queue_seconds"]
    assert all(0 <= part <= mine["seconds"] for part in parts)
    assert found[refused.headers["x-request-id"]]["status"] == 400
    assert any(line.get("finish_reasons") == ["cancelled"] for line in found.values())


def test_ps_shows_what_a_server_does(tmp_path: Path) -> None:
    config = configuration("fake fake_step_seconds=0.01", "idle")
    with fake_server(tmp_path, config) as server, streams(server, 3, max_tokens=2000):
        command = slimserve("ps", "--json", "--url", server.url)
        looks = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
        table = subprocess.run(slimserve("ps", "--url", server.url), capture_output=True, text=True, timeout=60)
    busy, idle = looks["models"]
    assert looks["ready"]
    assert (busy["name"], busy["state"], busy["running"], busy["device"]) == ("fake", "ready", 3, "cpu")
    assert 0 < busy["tokens_per_second"] <= 3 / 0.01 * 1.5
    assert (idle["running"], idle["tokens_per_second"]) == (0, 0)
    assert [line.split()[0] for line in table.stdout.splitlines()] == ["model", "fake", "idle"]


def test_a_start_that_fails_is_an_object_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("models: [{source: no-such-model}]\n")
    config = (tmp_path / "config.yaml").read_text()
    with fake_server(tmp_path, config, "--log-format", "json", ready=False) as server:
        assert server.wait() == 2
        (failed,) = [line for line in map(json.loads, server.log.splitlines()) if line["level"] == "critical"]
    assert (failed["event"], failed["process"]) == ("failed", "api")
    assert "there is no model no-such-model" in failed["message"]


def test_text_lines_tell_requests_with_the_level_debug_only(tmp_path: Path) -> None:
    for level, told in (("info", False), ("debug", True)):
        folder = tmp_path / level
        folder.mkdir()
        with fake_server(folder, configuration("fake"), "--log-level", level) as server:
            answer = server.complete()
            request_id = answer.headers["x-request-id"]
            stopped(server)
            assert (f"request {request_id}: POST /v1/completions 200 in" in server.log) == told
