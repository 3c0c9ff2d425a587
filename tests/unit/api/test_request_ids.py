"""``X-Request-ID``: taken over where it is sane, made up where not, and on every answer."""

from __future__ import annotations

import pytest

from engines.manifest import Manifest
from server.api.routes import create_api
from server.api.state import ApiSettings
from server.errors import EngineUnavailable, Overloaded, RateLimited, SlimserveError
from server.tenants import TenantTable
from tests.unit.api.harness import ScriptedDispatcher, call, make_state

BODY = {"model": "tiny", "prompt": "a"}


@pytest.mark.parametrize("given", ["a", "A-b_c.d:1", "x" * 100])
def test_a_sane_one_is_the_client_s(manifest: Manifest, given: str) -> None:
    app = create_api(make_state(manifest, ScriptedDispatcher()))
    (answer,) = call(app, ("GET", "/version", None), headers={"x-request-id": given})
    assert answer.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", ["", " ", "a b", "x" * 101, "a\tb", 'a"b', "{a}", "a/b", "a%0ab"])
def test_another_is_replaced(manifest: Manifest, given: str) -> None:
    app = create_api(make_state(manifest, ScriptedDispatcher()))
    (answer,) = call(app, ("GET", "/version", None), headers={"x-request-id": given})
    (made,) = answer.headers.get_list("x-request-id")
    assert len(made) == 24
    assert set(made) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nowhere", None, 404),
        ("DELETE", "/v1/models", None, 405),
        ("POST", "/v1/completions", {"model": "tiny"}, 400),
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", {"model": "none", "prompt": "a"}, 404),
        ("POST", "/v1/completions", {"model": "tiny", "prompt": "a" * 5000}, 413),
        ("GET", "/health/live", None, 200),
    ],
)
def test_refusals_have_it(manifest: Manifest, method: str, path: str, body: object, status: int) -> None:
    app = create_api(make_state(manifest, ScriptedDispatcher(), settings=ApiSettings(max_body=4096)))
    (answer,) = call(app, (method, path, body), headers={"x-request-id": "mine"})
    assert answer.status_code == status
    assert answer.headers["x-request-id"] == "mine"


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("late", retry_after=1),
        RateLimited("much", retry_after=1),
        EngineUnavailable("gone"),
        SlimserveError("a fault"),
    ],
)
def test_errors_behind_the_routes_have_it(manifest: Manifest, error: SlimserveError) -> None:
    dispatcher = ScriptedDispatcher()
    dispatcher.refusal = error
    (answer,) = call(
        create_api(make_state(manifest, dispatcher)), ("POST", "/v1/completions", BODY), headers={"x-request-id": "m"}
    )
    assert answer.status_code == error.status
    assert answer.headers["x-request-id"] == "m"


def test_who_has_no_key_gets_it_too(manifest: Manifest) -> None:
    app = create_api(make_state(manifest, ScriptedDispatcher(), tenants=TenantTable(api_keys=("sesame",))))
    (answer,) = call(app, ("POST", "/v1/completions", BODY), headers={"x-request-id": "mine"})
    assert answer.status_code == 401
    assert answer.headers["x-request-id"] == "mine"


def test_a_fault_of_ours_has_it(manifest: Manifest) -> None:
    class Broken(ScriptedDispatcher):
        def submit(self, request: object) -> object:  # type: ignore[override]
            raise RuntimeError("a fault")

    app = create_api(make_state(manifest, Broken()))
    (answer,) = call(app, ("POST", "/v1/completions", BODY), headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "mine"
    assert "a fault" not in answer.text


def test_the_request_that_the_worker_gets_is_named_by_it(manifest: Manifest) -> None:
    dispatcher = ScriptedDispatcher(lambda request, choice: "a")
    app = create_api(make_state(manifest, dispatcher))
    call(app, ("POST", "/v1/completions", BODY | {"max_tokens": 1}), headers={"x-request-id": "mine"})
    assert dispatcher.requests[0].http_id == "mine"
