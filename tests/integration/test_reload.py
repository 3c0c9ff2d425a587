"""POST /admin/reload and SIGHUP on real processes: settings and models change, streams go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.fake_server import PATIENCE, FakeServer, configuration, fake_server, sabotage, wait_until
from tests.integration.stream_readers import StreamReader, reading
from tests.metrics_text import metric

SLOW = "fake fake_step_seconds=0.005"
TOKENS = 150


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with fake_server(tmp_path, configuration(SLOW)) as running:
        yield running


def reload(server: FakeServer, tmp_path: Path, *models: str, **options: Any) -> httpx.Response:
    (tmp_path / "config.yaml").write_text(configuration(*models, **options))
    return httpx.post(f"{server.url}/admin/reload", timeout=PATIENCE)


def asks(server: FakeServer, count: int, model: str = "fake", max_tokens: int = TOKENS) -> list[dict[str, Any]]:
    return [server.body(model, seed=seed, prompt=[seed % 7, 2, 3], max_tokens=max_tokens) for seed in range(count)]


def assert_same(readers: list[StreamReader], server: FakeServer, bodies: list[dict[str, Any]]) -> None:
    with reading(server.url, bodies) as references:
        pass
    for reader, reference in zip(readers, references, strict=True):
        reader.assert_whole()
        assert reader.text == reference.text


def names(server: FakeServer) -> list[str]:
    return [model["id"] for model in httpx.get(f"{server.url}/v1/models", timeout=PATIENCE).json()["data"]]


def documented(server: FakeServer) -> list[str]:
    """The model names that the schema allows."""
    page = httpx.get(f"{server.url}/openapi.json", timeout=PATIENCE).json()
    found: list[str] = page["components"]["schemas"]["CompletionBody"]["properties"]["model"]["enum"]
    return found


def outcome(response: httpx.Response) -> dict[str, list[str]]:
    assert response.status_code == 200, response.text
    return {name: value for name, value in response.json().items() if value}


def test_settings_of_the_scheduler_change_under_open_streams(server: FakeServer, tmp_path: Path) -> None:
    bodies = asks(server, 10, max_tokens=2 * TOKENS)
    with reading(server.url, bodies) as readers:
        workers = server.workers()
        answer = reload(server, tmp_path, SLOW, policy="static", target_tpot="40ms", max_wait="90s")
    [changed] = outcome(answer).values()
    assert sorted(changed) == ["max_wait", "policy", "target_tpot"]
    assert_same(readers, server, bodies)
    assert server.workers() == workers
    assert metric(server.url, "slimserve_requests_total", ending="error") == 0


def test_models_come_and_go_and_streams_of_both_end_well(server: FakeServer, tmp_path: Path) -> None:
    leaving = asks(server, 4)
    with reading(server.url, leaving) as readers:
        assert outcome(reload(server, tmp_path, "other fake_step_seconds=0.005")) == {
            "added": ["other"],
            "removed": ["fake"],
        }
        assert names(server) == documented(server) == ["other"]
        assert server.complete().status_code == 404
        wait_until(lambda: server.complete("other").status_code == 200, "the new model")
        assert not all(reader.done for reader in readers)
    for reader in readers:
        reader.assert_whole()
    wait_until(lambda: outcome_is_free(server, tmp_path), "the former model to go")
    assert outcome(reload(server, tmp_path, SLOW)) == {"added": ["fake"], "removed": ["other"]}
    wait_until(lambda: server.complete().status_code == 200, "the former model to come back")
    assert_same(readers, server, leaving)


def outcome_is_free(server: FakeServer, tmp_path: Path) -> bool:
    return httpx.post(f"{server.url}/admin/reload", timeout=PATIENCE).status_code == 200


def test_changed_model_drains_and_new_requests_wait_for_its_new_form(server: FakeServer, tmp_path: Path) -> None:
    bodies = asks(server, 4)
    with reading(server.url, bodies) as readers:
        assert outcome(reload(server, tmp_path, f"{SLOW} max_model_len=100")) == {"changed": ["fake"]}
        # It waits until the former streams, which are longer than the new form could hold, have ended.
        assert server.complete().status_code == 200
        assert all(reader.done for reader in readers)
    for reader in readers:
        reader.assert_whole()
    assert httpx.get(f"{server.url}/v1/models", timeout=PATIENCE).json()["data"][0]["max_model_len"] == 100
    assert server.complete(max_tokens=TOKENS).status_code == 400


def test_worker_killed_while_its_model_drains_costs_nothing(server: FakeServer, tmp_path: Path) -> None:
    bodies = asks(server, 4, max_tokens=2 * TOKENS)
    with reading(server.url, bodies) as readers:
        assert outcome(reload(server, tmp_path, f"{SLOW} max_model_len=100")) == {"changed": ["fake"]}
        [worker] = server.workers()
        worker.kill()
        assert server.complete().status_code == 200
    for reader in readers:
        reader.assert_whole()
    assert all(reader.finish == "length" for reader in readers)


def test_replicas_come_and_go(server: FakeServer, tmp_path: Path) -> None:
    bodies = asks(server, 6, max_tokens=2 * TOKENS)
    with reading(server.url, bodies) as readers:
        assert outcome(reload(server, tmp_path, f"{SLOW} replicas=2")) == {"changed": ["fake"]}
        wait_until(lambda: len(server.workers()) == 2, "the second worker")
        server.wait_ready()
        assert not any(reader.done for reader in readers), "one that stays is not drained"
        wait_until(lambda: outcome_is_free(server, tmp_path), "the reload to end")
        assert outcome(reload(server, tmp_path, SLOW)) == {"changed": ["fake"]}
        wait_until(lambda: len(server.workers()) == 1, "the second worker to go")
        assert server.complete().status_code == 200
    assert_same(readers, server, bodies)


def test_model_whose_new_form_cannot_be_loaded_is_served_as_before(tmp_path: Path) -> None:
    environment = sabotage(
        tmp_path,
        """
        from engines.fake import FakeEngine
        from engines.protocol import EngineLoadError

        healthy = FakeEngine.load.__func__

        def load(cls, spec, report):
            if spec.max_model_len == 50:
                raise EngineLoadError("it does not fit")
            return healthy(cls, spec, report)

        FakeEngine.load = classmethod(load)
        """,
    )
    with fake_server(tmp_path, configuration(SLOW), environment=environment) as server:
        bodies = asks(server, 3)
        with reading(server.url, bodies) as readers:
            assert outcome(reload(server, tmp_path, f"{SLOW} max_model_len=50")) == {"changed": ["fake"]}
            waiting = server.complete()
            assert waiting.status_code == 503
            assert "could not be changed" in waiting.json()["error"]["message"]
        wait_until(lambda: server.complete(max_tokens=TOKENS).status_code == 200, "the former model")
        assert_same(readers, server, bodies)
        assert "it does not fit" in server.log
        assert outcome(reload(server, tmp_path, f"{SLOW} max_model_len=100")) == {"changed": ["fake"]}
        wait_until(lambda: server.complete(max_tokens=TOKENS).status_code == 400, "a form that can be loaded")


def test_what_is_wrong_or_cannot_change_is_refused_whole(server: FakeServer, tmp_path: Path) -> None:
    for options, words in (
        ({"host": "127.0.0.2"}, "host cannot change while the server runs"),
        ({"log_level": "debug"}, "log_level cannot change"),
        ({"no_such_option": 1}, "no_such_option: unknown option"),
        ({"target_tpot": "soon"}, "target_tpot"),
    ):
        refused = reload(server, tmp_path, SLOW, "more", **options)
        assert refused.status_code == 400
        assert words in refused.json()["error"]["message"]
    assert reload(server, tmp_path, f'{SLOW} source="nowhere/at/all" kind="generation"').status_code == 400
    (tmp_path / "config.yaml").write_text("models: [")
    assert httpx.post(f"{server.url}/admin/reload", timeout=PATIENCE).status_code == 400
    assert names(server) == ["fake"]
    assert server.complete().status_code == 200


def test_one_reload_at_a_time(server: FakeServer, tmp_path: Path) -> None:
    with reading(server.url, asks(server, 1)):
        assert reload(server, tmp_path, f"{SLOW} max_model_len=100").status_code == 200
        refused = reload(server, tmp_path, SLOW)
        assert refused.status_code == 409
        assert int(refused.headers["retry-after"]) >= 1


def test_hangup_reloads_too(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(configuration(SLOW, "more"))
    server.signal(signal.SIGHUP)
    wait_until(lambda: names(server) == ["fake", "more"], "the second model")
    wait_until(lambda: server.complete("more").status_code == 200, "the second model to serve")
    (tmp_path / "config.yaml").write_text(configuration(SLOW, log_level="debug"))
    server.signal(signal.SIGHUP)
    wait_until(lambda: "nothing was reloaded: log_level cannot change" in server.log, "the refusal in the log")
    assert server.complete().status_code == 200


def test_admin_needs_its_key_where_one_is_set(tmp_path: Path) -> None:
    environment = {"SLIMSERVE_ADMIN_KEY": "an-admin-key-of-this-test"}
    with fake_server(tmp_path, configuration(SLOW), environment=environment) as server:
        assert reload(server, tmp_path, SLOW).status_code == 401
        headers = {"authorization": f"Bearer {environment['SLIMSERVE_ADMIN_KEY']}"}
        assert httpx.post(f"{server.url}/admin/reload", headers=headers, timeout=PATIENCE).status_code == 200


def test_without_a_key_a_proxy_or_a_web_page_cannot_reload(server: FakeServer) -> None:
    for headers in ({"x-forwarded-for": "10.1.2.3"}, {"origin": "https://example.org"}):
        assert httpx.post(f"{server.url}/admin/reload", headers=headers, timeout=PATIENCE).status_code == 401
