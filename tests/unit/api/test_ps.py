"""``slimserve ps`` over the real ``/stats``, and what it makes of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import httpx
import pytest
from rich.console import Console

from engines.manifest import Manifest
from server.api.routes import create_api
from server.api.state import ApiState, ModelState, ReadyState
from server.errors import CommandFailed
from server.ps_command import Watcher, show_live, show_once
from server.tenants import TenantTable
from server.worker.wire import EngineLoad, LoadReport
from tests.unit.api.harness import Now, ScriptedDispatcher, call, make_state


def transport(state: ApiState) -> httpx.MockTransport:
    """The application itself, called where a client would open a connection."""

    def answer(request: httpx.Request) -> httpx.Response:
        headers = {"authorization": request.headers.get("authorization", "")}
        found = call(create_api(state), (request.method, request.url.path, None), headers=headers)[0]
        return httpx.Response(found.status_code, content=found.content)

    return httpx.MockTransport(answer)


@pytest.fixture
def clock() -> Now:
    return Now(100.0)


@pytest.fixture
def state(manifest: Manifest, clock: Now) -> ApiState:
    models = (
        ModelState(name="tiny", state="ready", device="cpu", dtype="float32"),
        ModelState(name="late", state="starting", phase="downloading", done=30, total=120),
    )
    made = make_state(
        manifest,
        ScriptedDispatcher(),
        names=("tiny", "late"),
        ready=lambda: ReadyState(True, False, models),
        clock=clock,
    )
    load = EngineLoad(
        name="tiny", running=3, waiting=2, waiting_tokens=9, blocks_used=25, blocks_cached=0, blocks_total=100,
        token_budget=512, preemptions=0, prefix_queries=0, prefix_hits=0, integrity_errors=0,
    )  # fmt: skip
    made.metrics.load_report(0, LoadReport(incarnation=1, steps=1, phase="step", rss_bytes=1, engines=[load]))
    return made


def works(state: ApiState, clock: Now) -> Callable[[float], None]:
    """A pause in which the model makes 300 tokens a second."""

    def pause(seconds: float) -> None:
        clock.seconds += seconds
        state.metrics.tokens_delivered("tiny", int(300 * seconds), {})

    return pause


def printed(state: ApiState, clock: Now, *, as_json: bool) -> str:
    console = Console(file=io.StringIO(), width=200)
    with Watcher("http://server", None, transport(state)) as watcher:
        show_once(watcher, console, as_json=as_json, pause=works(state, clock))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_plain_table_without_a_terminal(state: ApiState, clock: Now) -> None:
    header, tiny, late = printed(state, clock, as_json=False).splitlines()
    assert header.split()[:4] == ["model", "state", "device", "dtype"]
    assert tiny.split() == ["tiny", "ready", "cpu", "float32", "3", "2", "300", "25%", "0"]
    assert "starting: downloading 25%" in late


def test_json_has_the_numbers(state: ApiState, clock: Now) -> None:
    (line,) = printed(state, clock, as_json=True).splitlines()
    found = json.loads(line)
    assert (found["version"], found["ready"]) == ("1.2.3", False)
    tiny, late = found["models"]
    assert (tiny["running"], tiny["waiting"], tiny["tokens_per_second"], tiny["kv_usage"]) == (3, 2, 300.0, 0.25)
    assert (late["phase"], late["progress"], tiny["progress"]) == ("downloading", 0.25, None)


def test_a_terminal_is_drawn_again_until_ctrl_c(state: ApiState, clock: Now) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    work, pauses = works(state, clock), []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 4:
            raise KeyboardInterrupt
        work(seconds)

    with Watcher("http://server", None, transport(state)) as watcher:
        show_live(watcher, console, 2.0, pause=pause)
    assert pauses == [0.5, 2.0, 2.0, 2.0]
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("tokens/s") == 4  # the last one stays on the screen


def test_a_missing_key_is_said(manifest: Manifest, clock: Now) -> None:
    state = make_state(manifest, ScriptedDispatcher(), tenants=TenantTable(api_keys=("sesame",)))
    with Watcher("http://server", None, transport(state)) as watcher, pytest.raises(CommandFailed, match="API key"):
        watcher.look()
    with Watcher("http://server", "sesame", transport(state)) as watcher:
        assert watcher.look().models[0].name == "tiny"


def test_something_else_that_answers_is_said() -> None:
    page = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>"))
    with Watcher("http://server", None, page) as watcher, pytest.raises(CommandFailed, match="no slimserve"):
        watcher.look()
