"""What a request asks for beside its answer, and how it is refused when it cannot have it."""

from __future__ import annotations

from typing import Any

import pytest

from engines.manifest import Manifest
from server.admission import Door
from server.api.routes import create_api
from server.api.state import ApiState
from server.errors import Overloaded, SlimserveError
from server.requests import Request, Targets
from server.worker.wire import Refused
from tests.metrics_text import value
from tests.unit.api.harness import Connection, ScriptedDispatcher, call, make_state, post, run, until

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def make(manifest: Manifest, **targets: Targets) -> tuple[ApiState, ScriptedDispatcher]:
    dispatcher = ScriptedDispatcher(lambda *_: "abc")
    return make_state(manifest, dispatcher, targets=targets), dispatcher


def asked(manifest: Manifest, headers: dict[str, str] | None = None, path: str = COMPLETION, **body: Any) -> Request:
    state, dispatcher = make(manifest, normal=Targets(2.0, 0.1), high=Targets(0.5))
    fields = {"messages": HELLO} if path == CHAT else {"prompt": "x"}
    request = ("POST", path, {"model": "tiny"} | fields | body)
    assert call(create_api(state), request, headers=headers)[0].status_code == 200
    return dispatcher.requests[0]


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, ("normal", 2.0, 0.1, True)),
        ({"priority": None, "slo": None}, ("normal", 2.0, 0.1, True)),
        ({"priority": "high"}, ("high", 0.5, None, True)),
        ({"priority": "low"}, ("low", None, None, False)),
        ({"slo": {"ttft_ms": 250}}, ("normal", 0.25, 0.1, True)),
        ({"priority": "low", "slo": {"tpot_ms": 7.5}}, ("low", None, 0.0075, True)),
        ({"priority": "low", "slo": {}}, ("low", None, None, False)),
    ],
)
def test_the_request_s_targets_win_over_those_of_its_class(
    manifest: Manifest, path: str, body: dict[str, Any], expected: Any
) -> None:
    request = asked(manifest, path=path, **body)
    assert (request.priority, request.ttft, request.tpot, request.firm) == expected


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"priority": "urgent"}, "priority"),
        ({"priority": 0}, "priority"),
        ({"slo": {"ttft_ms": 0}}, "slo.ttft_ms"),
        ({"slo": {"tpot_ms": 1e-320}}, "slo.tpot_ms"),
        ({"slo": {"tpot_ms": 1e9}}, "slo.tpot_ms"),
        ({"slo": {"e2e_ms": 5}}, "slo.e2e_ms"),
        ({"slo": "fast"}, "slo"),
    ],
)
def test_wrong_fields_are_refused_by_name(manifest: Manifest, body: dict[str, Any], param: str) -> None:
    reply = post(make(manifest)[0], COMPLETION, prompt="x", **body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("headers", "timeout"),
    [
        ({}, None),
        ({"X-Request-Timeout-Ms": "1500"}, 1.5),
        ({"X-Stainless-Read-Timeout": "600"}, 600.0),
        ({"X-Stainless-Read-Timeout": "2.5", "X-Request-Timeout-Ms": "100"}, 0.1),
        ({"X-Stainless-Read-Timeout": "None"}, None),
        ({"X-Stainless-Read-Timeout": "inf"}, None),
        ({"X-Stainless-Read-Timeout": "-1"}, None),
    ],
)
def test_the_client_s_patience_is_known(manifest: Manifest, headers: dict[str, str], timeout: float | None) -> None:
    assert asked(manifest, headers).timeout == timeout


@pytest.mark.parametrize("text", ["", "soon", "0", "-5", "nan", "1e99", "1e-320"])
def test_a_wrong_timeout_is_refused(manifest: Manifest, text: str) -> None:
    request = ("POST", COMPLETION, {"model": "tiny", "prompt": "x"})
    [reply] = call(create_api(make(manifest)[0]), request, headers={"X-Request-Timeout-Ms": text})
    assert reply.status_code == 400
    assert "x-request-timeout-ms" in reply.json()["error"]["message"]


def test_a_refusal_tells_what_was_predicted(manifest: Manifest) -> None:
    state, dispatcher = make(manifest)
    dispatcher.refusal = Overloaded(
        "Too late.", reason="target", queue_seconds=3.21, predicted_ttft=4.5678, retry_after=2.1
    )
    reply = post(state, COMPLETION, prompt="x")
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "3"
    assert reply.json()["error"] == {
        "message": "Too late.",
        "type": "overloaded_error",
        "param": None,
        "code": "overloaded",
        "predicted_ttft_ms": 4567.8,
        "queue_seconds": 3.21,
    }
    assert value(state.metrics.render().decode(), "slimserve_http_refusals_total", model="tiny", reason="target") == 1


def late(kind: Any) -> SlimserveError:
    """What the worker's refusal becomes."""
    return Door(clock=lambda: 0.0).refusal(Refused(1, [1], "the KV cache is too small", kind, 3.0))


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [("invalid", 400, None), ("overload", 503, "overloaded"), ("timeout", 504, "timeout")],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_worker_s_refusal_has_its_own_status_also_for_a_stream(
    manifest: Manifest, kind: Any, status: int, code: str | None, stream: bool
) -> None:
    async def main() -> None:
        dispatcher = ScriptedDispatcher()
        body = {"model": "tiny", "prompt": "x", "stream": stream}
        connection = Connection(create_api(make_state(manifest, dispatcher)), COMPLETION, body)
        await until(lambda: dispatcher.replies)
        dispatcher.replies[0].fail(late(kind))
        await connection.task
        assert connection.status == status
        assert f'"code":{"null" if code is None else chr(34) + code + chr(34)}' in connection.text
        assert (b"retry-after" in dict(connection.sent[0]["headers"])) == (kind == "overload")

    run(main())
