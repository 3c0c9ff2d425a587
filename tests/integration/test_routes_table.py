"""The table of routes in docs/operations.md: it lists the application's, and each cell is what a request gets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import Route

from engines.manifest import Manifest
from server.api.replies import ReloadOutcome
from server.api.routes import create_api, create_metrics_api
from server.tenants import hash_key
from tests.integration.fake_server import PATIENCE, FakeServer, configuration, fake_server
from tests.unit.api.harness import ScriptedDispatcher, close_texts, make_state, write_model

ROOT = Path(__file__).resolve().parents[2]
CALLERS = ("no key set", "no key sent", "a tenant's", "API key", "admin key")
KEYS = {"a tenant's": "a-key-long-enough-for-a-tenant", "API key": "the-api-key", "admin key": "the-admin-key"}


class Row(NamedTuple):
    method: str
    path: str
    cells: dict[str, str]
    """What the table says, by caller."""


def table() -> list[Row]:
    text = (ROOT / "docs" / "operations.md").read_text()
    lines = text[text.index("### Each route") :].splitlines()
    head = next(line for line in lines if line.startswith("| route"))
    assert tuple(cell.strip() for cell in head.strip("|").split("|"))[1:] == CALLERS
    rows = []
    for line in lines:
        found = re.match(r"\| `(GET|POST) (\S+)`[^|]*\|(.+)\|$", line)
        if found is not None:
            cells = [cell.strip() for cell in found[3].split("|")]
            rows.append(Row(found[1], found[2], dict(zip(CALLERS, cells, strict=True))))
    return rows


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Of each route its method, less HEAD beside GET, and its path."""
    assert all(isinstance(route, Route) for route in app.routes)  # a mount would hide routes of its own
    found = [route for route in app.routes if isinstance(route, Route)]
    return [(method, route.path) for route in found for method in (route.methods or set()) - {"HEAD"}]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manifest]:
    yield write_model(tmp_path_factory.mktemp("tiny"))
    close_texts()


def test_the_table_lists_exactly_the_routes_of_the_application(manifest: Manifest) -> None:
    async def reload() -> ReloadOutcome:
        raise AssertionError("nothing is asked here")

    state = make_state(manifest, ScriptedDispatcher())
    state.reload = reload
    rows = [(row.method, row.path) for row in table()]
    assert sorted(rows) == sorted(routes(create_api(state)))
    assert routes(create_metrics_api(state)) == [("GET", "/metrics")]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, FakeServer]]:
    """Two real servers: whether keys are set."""
    folder, locked = tmp_path_factory.mktemp("open"), tmp_path_factory.mktemp("locked")
    tenants = {"tenants": [{"name": "a", "keys": [hash_key(KEYS["a tenant's"])]}]}
    (locked / "tenants.yaml").write_text(json.dumps(tenants))
    keys = {"SLIMSERVE_API_KEY": KEYS["API key"], "SLIMSERVE_ADMIN_KEY": KEYS["admin key"]}
    config = configuration("fake", tenants=str(locked / "tenants.yaml"))
    with fake_server(folder, configuration("fake")) as first, fake_server(locked, config, environment=keys) as second:
        yield {False: first, True: second}


def of_fake(path: str) -> str:
    return path.replace("{model_id:path}", "fake").replace("{model_name}", "fake").replace("{version}", "1")


def status(servers: dict[bool, FakeServer], caller: str, method: str, path: str, **headers: str) -> int:
    if caller in KEYS:
        headers["authorization"] = f"Bearer {KEYS[caller]}"
    url = servers[caller != "no key set"].url + of_fake(path)
    return httpx.request(method, url, headers=headers, timeout=PATIENCE).status_code


@pytest.mark.parametrize("caller", CALLERS)
def test_each_cell_is_what_a_request_gets(servers: dict[bool, FakeServer], caller: str) -> None:
    wrong = []
    for row in table():
        here = status(servers, caller, row.method, row.path)
        elsewhere = status(servers, caller, row.method, row.path, **{"x-forwarded-for": "203.0.113.7"})
        got = tuple("open" if each in (200, 400) else str(each) for each in (here, elsewhere))
        wanted = ("open", "401") if row.cells[caller] == "this machine" else (row.cells[caller],) * 2
        if got != wanted:
            wrong.append((row.method, row.path, got, wanted))
    assert not wrong


def test_a_wrong_key_opens_as_much_as_none(servers: dict[bool, FakeServer]) -> None:
    for row in table():
        url = servers[True].url + of_fake(row.path)
        for authorization in ("Bearer wrong", "Bearer", "Basic dGhlOmtleQ==", "Bearer the-api-key-and-more"):
            answer = httpx.request(row.method, url, headers={"authorization": authorization}, timeout=PATIENCE)
            wanted = (200,) if row.cells["no key sent"] == "open" else (401,)
            assert answer.status_code in wanted, (row.path, authorization)


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/models/", "/metrics/", "/docs", "/web/..%2fstats", "//stats"])
@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "GET"])
def test_what_is_not_listed_is_refused(servers: dict[bool, FakeServer], method: str, path: str) -> None:
    if (method, path) == ("GET", "/"):
        pytest.skip("this one is listed")
    got = status(servers, "no key sent", method, path)
    assert got == (405 if path == "/" else 401)
    assert status(servers, "API key", method, path) in (404, 405)


def test_the_page_links_where_deployment_is_told() -> None:
    assert "(../deploy/README.md)" in (ROOT / "docs" / "operations.md").read_text()
