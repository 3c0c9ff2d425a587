"""Keys, tenants, quotas and the admin gate, through the whole application."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import httpx
import pytest

from engines.manifest import Manifest
from server.api.routes import create_api
from server.api.state import ApiState
from server.tenants import TenantEntry, TenantTable
from tests.metrics_text import value
from tests.unit.api.harness import Connection, Now, ScriptedDispatcher, make_state, run, until

BODY = {"model": "tiny", "prompt": "x", "max_tokens": 3}


def table(**limits: Any) -> TenantTable:
    """Tenants a, who has the limits, and b, who has none; their keys are their names."""
    entries = [
        TenantEntry(
            name=name, keys=["sha256:" + hashlib.sha256(name.encode()).hexdigest()], **(limits if name == "a" else {})
        )
        for name in ("a", "b")
    ]
    return TenantTable(entries, api_keys=["operator"])


def make(manifest: Manifest, tenants: TenantTable, dispatcher: ScriptedDispatcher | None = None) -> ApiState:
    return make_state(manifest, dispatcher or ScriptedDispatcher(lambda *_: "abc"), tenants=tenants)


def ask(state: ApiState, method: str, path: str, key: str = "", client: str = "127.0.0.1", **options: Any) -> Any:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app=create_api(state), client=(client, 1))
        headers = ({"authorization": f"Bearer {key}"} if key else {}) | options.pop("headers", {})
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.request(method, path, headers=headers, **options)

    return run(main())


def test_a_tenants_request_carries_its_name_weight_and_salt(manifest: Manifest) -> None:
    dispatcher = ScriptedDispatcher(lambda *_: "abc")
    state = make(manifest, table(weight=3.0), dispatcher)
    for key in ("a", "b", "operator"):
        assert ask(state, "POST", "/v1/completions", key, json=BODY | {"cache_salt": "s"}).status_code == 200
    assert ask(state, "POST", "/v1/completions", "operator", json=BODY).status_code == 200
    seen = [(request.tenant, request.weight, request.cache_salt) for request in dispatcher.requests]
    assert seen == [("a", 3.0, "a/s"), ("b", 1.0, "b/s"), ("", 1.0, "/s"), ("", 1.0, "")]


def test_a_quota_is_429_with_the_headers_that_clients_read(manifest: Manifest) -> None:
    state = make(manifest, table(requests_per_minute=2, tokens_per_minute=1000))
    first = ask(state, "POST", "/v1/completions", "a", json=BODY)
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == "1000"
    ask(state, "POST", "/v1/completions", "a", json=BODY)
    refused = ask(state, "POST", "/v1/completions", "a", content=b"not even JSON")
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.headers["retry-after"] == "30"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert int(refused.headers["x-ratelimit-remaining-tokens"]) == 1000 - 2 * (1 + 3)
    other = ask(state, "POST", "/v1/completions", "b", json=BODY)
    assert other.status_code == 200
    assert not [name for name in other.headers if name.startswith("x-ratelimit")]
    page = state.metrics.render().decode()
    assert value(page, "slimserve_tenant_refusals_total", tenant="a", reason="quota_requests") == 1
    assert ask(state, "GET", "/v1/models", "a").status_code == 200


def test_tokens_are_charged_where_the_client_leaves_early(manifest: Manifest) -> None:
    state = make(manifest, table(tokens_per_minute=10), dispatcher := ScriptedDispatcher())

    async def main() -> None:
        body = BODY | {"stream": True, "max_tokens": 99}
        stream = Connection(create_api(state), "/v1/completions", body, key="a")
        await until(lambda: dispatcher.replies)
        dispatcher.replies[0].deliver(0, 0, [65] * 20, "", now=0.0)
        await until(lambda: stream.sent)
        stream.leave()
        await stream.task

    run(main())
    assert ask(state, "POST", "/v1/completions", "a", json=BODY).status_code == 429


def test_open_requests_of_a_tenant_are_bounded(manifest: Manifest) -> None:
    async def main() -> None:
        dispatcher = ScriptedDispatcher()
        app = create_api(make(manifest, table(max_concurrent=1), dispatcher))
        first = Connection(app, "/v1/completions", BODY, key="a")
        await until(lambda: dispatcher.replies)
        refused = Connection(app, "/v1/completions", BODY, key="a")
        await refused.task
        assert refused.status == 429
        Connection(app, "/v1/completions", BODY, key="b")
        await until(lambda: len(dispatcher.replies) == 2)
        for reply in dispatcher.replies:
            reply.deliver(0, 0, [65], "length", now=0.0)
        await first.task
        Connection(app, "/v1/completions", BODY, key="a")
        await until(lambda: len(dispatcher.replies) == 3)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    run(main())


def test_a_quota_comes_back_with_time(manifest: Manifest) -> None:
    state = make(manifest, table(requests_per_minute=1))
    clock = state.clock
    assert isinstance(clock, Now)
    assert ask(state, "POST", "/v1/completions", "a", json=BODY).status_code == 200
    assert ask(state, "POST", "/v1/completions", "a", json=BODY).status_code == 429
    clock.seconds += 60
    assert ask(state, "POST", "/v1/completions", "a", json=BODY).status_code == 200


def test_one_tenant_does_not_see_the_others_in_the_metrics(manifest: Manifest) -> None:
    state = make(manifest, table())
    refused = ask(state, "GET", "/metrics", "a")
    assert refused.status_code == 403
    assert ask(state, "GET", "/metrics", "operator").status_code == 200


def test_high_priority_needs_permission(manifest: Manifest) -> None:
    refused = ask(make(manifest, table()), "POST", "/v1/completions", "a", json=BODY | {"priority": "high"})
    assert refused.status_code == 403
    assert refused.json()["error"]["param"] == "priority"
    state = make(manifest, table(max_priority="high"))
    assert ask(state, "POST", "/v1/completions", "a", json=BODY | {"priority": "high"}).status_code == 200


def test_a_reload_may_swap_the_tenants(manifest: Manifest) -> None:
    state = make(manifest, table())
    app = create_api(state)
    assert ask(state, "GET", "/v1/models", "a").status_code == 200
    state.tenants = TenantTable(api_keys=["operator"])

    async def main() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as http:
            return (await http.get("/v1/models", headers={"authorization": "Bearer a"})).status_code

    assert run(main()) == 401


ADMIN = "/admin/nothing"
OPEN, CLOSED = 404, 401
"""There is no such route: a 404 means that the gate is open."""


@pytest.mark.parametrize(
    ("admin_key", "key", "client", "headers", "status"),
    [
        (None, "", "127.0.0.1", {}, OPEN),
        (None, "", "::1", {}, OPEN),
        (None, "", "10.0.0.1", {}, CLOSED),
        (None, "operator", "10.0.0.1", {}, CLOSED),
        (None, "", "127.0.0.1", {"x-forwarded-for": "10.0.0.1"}, CLOSED),
        (None, "", "127.0.0.1", {"forwarded": "for=10.0.0.1"}, CLOSED),
        (None, "", "127.0.0.1", {"origin": "http://a.example"}, CLOSED),
        (None, "", "127.0.0.1", {"sec-fetch-site": "cross-site"}, CLOSED),
        ("boss", "boss", "10.0.0.1", {}, OPEN),
        ("boss", "", "127.0.0.1", {}, CLOSED),
        ("boss", "operator", "127.0.0.1", {}, CLOSED),
        ("boss", "a", "127.0.0.1", {}, CLOSED),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_admin_routes_need_the_admin_key_or_this_machine(
    manifest: Manifest, method: str, admin_key: str | None, key: str, client: str, headers: Any, status: int
) -> None:
    tenants = TenantTable(api_keys=["operator"], admin_key=admin_key)
    reply = ask(make(manifest, tenants), method, ADMIN, key, client, headers=headers)
    assert reply.status_code == status
