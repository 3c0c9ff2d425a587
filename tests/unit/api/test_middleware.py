from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engines.manifest import Manifest
from server.api.callers import ApiKeys, TenantQuotas
from server.api.middleware import BodyLimit, ConnectionLimit, RequestIds
from server.api.routes import create_api
from server.api.state import ApiSettings
from server.tenants import TenantTable
from tests.unit.api.harness import Connection, ScriptedDispatcher, make_state, run, until

KEY = "sesame-ü"


def ask(app: ASGIApp, method: str, path: str, **options: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            return await client.request(method, path, **options)

    return run(main())


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Tells how long the body was."""
    body = (await receive()).get("body", b"")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/version", "/openapi.json", "/unknown", "/health/live/"])
def test_every_route_but_health_needs_the_key(manifest: Manifest, path: str) -> None:
    app = create_api(make_state(manifest, ScriptedDispatcher(), tenants=TenantTable(api_keys=("other", KEY))))
    for value in (b"", b"Bearer", b"Bearer ", b"Bearer wrong", KEY.encode(), b"Basic " + KEY.encode(), b"Bearer \xff"):
        reply = ask(app, "GET", path, headers={b"authorization": value} if value else {})
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    reply = ask(app, "GET", path, headers={b"authorization": b"bearer " + KEY.encode()})
    assert reply.status_code == (404 if path in ("/unknown", "/health/live/") else 200)


def test_health_needs_no_key(manifest: Manifest) -> None:
    app = create_api(make_state(manifest, ScriptedDispatcher(), tenants=TenantTable(api_keys=(KEY,))))
    assert ask(app, "GET", "/health/live").status_code == 200
    assert ask(app, "GET", "/health/ready").status_code == 200


def test_request_id_is_the_clients_or_new() -> None:
    app = RequestIds(answer)
    assert ask(app, "GET", "/", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    strange = ask(app, "GET", "/", headers={"x-request-id": "a b" * 99}).headers["x-request-id"]
    assert len(strange) == 24
    assert ask(app, "GET", "/").headers["x-request-id"] != strange


def test_fault_is_a_bare_500_and_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("/secret/path")

    reply = ask(RequestIds(broken), "GET", "/", headers={"x-request-id": "mine-2"})
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "server_error"
    assert "secret" not in reply.text
    assert "mine-2" in caplog.text
    assert "/secret/path" in caplog.text


def test_body_up_to_the_limit_passes() -> None:
    app = BodyLimit(answer, limit=10, timeout=5)
    assert ask(app, "POST", "/", content=b"x" * 10).text == "10"
    assert ask(app, "GET", "/").text == "0"


def stream_of(*chunks: bytes) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages[-1]["more_body"] = False
    waiting = iter(messages)

    async def receive() -> Message:
        message = next(waiting, None)
        return message if message is not None else await asyncio.Future()

    return receive


def send_through(app: ASGIApp, receive: Receive, headers: list[tuple[bytes, bytes]]) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    run(app(scope, receive, send))  # type: ignore[arg-type]
    return sent


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"12")], [(b"content-length", b"3")]])
def test_body_beyond_the_limit_is_read_and_refused(headers: list[tuple[bytes, bytes]]) -> None:
    sent = send_through(BodyLimit(answer, limit=10, timeout=5), stream_of(b"x" * 6, b"x" * 6), headers)
    assert sent[0]["status"] == 413
    assert (b"connection", b"close") in sent[0]["headers"]


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-length", b"321")],
        [(b"content-length", b"11"), (b"expect", b"100-continue")],
    ],
)
def test_hopeless_body_is_refused_unread(headers: list[tuple[bytes, bytes]]) -> None:
    async def receive() -> Message:
        raise AssertionError("the body was read")

    assert send_through(BodyLimit(answer, limit=10, timeout=5), receive, headers)[0]["status"] == 413


def test_endless_body_is_given_up() -> None:
    async def receive() -> Message:
        return {"type": "http.request", "body": b"x" * 6, "more_body": True}

    assert send_through(BodyLimit(answer, limit=10, timeout=5), receive, [])[0]["status"] == 413


def test_slow_body_is_given_up() -> None:
    async def receive() -> Message:
        return await asyncio.Future()

    sent = send_through(BodyLimit(answer, limit=10, timeout=0.01), receive, [])
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "request_timeout"


def test_client_that_leaves_while_sending_reaches_nothing() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    assert send_through(RequestIds(BodyLimit(answer, limit=10, timeout=5)), receive, []) == []


def test_connections_beyond_the_limit_get_503_and_health_does_not() -> None:
    async def main() -> None:
        release = asyncio.Event()

        async def slow(scope: Scope, receive: Receive, send: Send) -> None:
            await release.wait()
            await answer(scope, receive, send)

        app = ConnectionLimit(slow, limit=1)
        first = Connection(app, "/", {})
        await asyncio.sleep(0)
        second = Connection(app, "/", {})
        health = Connection(app, "/health/live", {})
        await second.task
        assert second.status == 503
        assert dict(second.sent[0]["headers"])[b"retry-after"] == b"1"
        assert not health.sent
        release.set()
        await first.task
        await health.task
        third = Connection(app, "/", {})
        await third.task
        assert first.status == health.status == third.status == 200

    run(main())


def test_other_protocols_pass_untouched(manifest: Manifest) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    scope = {"type": "lifespan"}
    state = make_state(manifest, ScriptedDispatcher(), tenants=TenantTable(api_keys=("x",)))
    inner = ConnectionLimit(BodyLimit(app, limit=1, timeout=1), limit=0)
    stack = RequestIds(ApiKeys(TenantQuotas(inner, state), state))
    run(stack(scope, stream_of(b""), None))  # type: ignore[arg-type]
    assert seen == [scope]


def test_limits_are_those_of_the_settings(manifest: Manifest) -> None:
    app = create_api(make_state(manifest, ScriptedDispatcher(), settings=ApiSettings(max_body=20)))
    assert ask(app, "POST", "/tokenize", json={"prompt": "x" * 30}).status_code == 413


def test_stream_counts_as_a_connection_until_it_ends(manifest: Manifest) -> None:
    async def main() -> None:
        dispatcher = ScriptedDispatcher()
        app = create_api(make_state(manifest, dispatcher, settings=ApiSettings(max_connections=1)))
        body = {"model": "tiny", "prompt": "x", "stream": True}
        stream = Connection(app, "/v1/completions", body)
        await until(lambda: dispatcher.replies)
        refused = Connection(app, "/v1/completions", body)
        await refused.task
        assert refused.status == 503
        stream.leave()
        await stream.task

    run(main())
