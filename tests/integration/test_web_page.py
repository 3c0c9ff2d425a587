"""The page in a real browser, against a live server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.servers import Server
from server.gpu_metrics import GpuMetrics
from server.nvml import GpuSample
from server.web.page import FILES
from tests.browser import browser, complaints, resize
from tests.integration.fake_server import FakeServer, configuration, fake_server, streams, wait_until
from tests.integration.in_process import serving
from tests.metrics_text import metric
from tests.unit.api.harness import write_model

STEP = 0.02
"""Seconds: slow enough that a stream can be stopped on its way."""
MODELS = (f"fake fake_step_seconds={STEP}", "other")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def server(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with fake_server(tmp_path_factory.mktemp("page"), configuration(*MODELS)) as running:
        yield running


@pytest.fixture
def page(chromium: Any, server: FakeServer) -> Iterator[Any]:
    """Fresh, at the playground. Nothing that a test did may have made the browser complain."""
    resize(chromium, 1280, 900)
    yield visit(chromium, server.url)
    assert complaints(chromium) == []


def visit(chromium: Any, url: str) -> Any:
    chromium.get("about:blank")
    complaints(chromium)
    chromium.get(f"{url}/")
    wait_until(lambda: "connecting" not in text(chromium, "#status"), "the server's state")
    return chromium


def find(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def text(page: Any, selector: str) -> str:
    """Of all elements that match, by lines."""
    return "\n".join(each.text for each in page.find_elements("css selector", selector))


def write(page: Any, selector: str, value: str) -> None:
    field = find(page, selector)
    field.clear()
    field.send_keys(value)


def choose(page: Any, selector: str, value: str) -> None:
    find(page, f"{selector} option[value='{value}']").click()


def ask_for_text(page: Any, prompt: str, max_tokens: int) -> None:
    find(page, ".segmented label:nth-of-type(2)").click()
    choose(page, "#model", "fake")
    write(page, "#max_tokens", str(max_tokens))
    find(page, "#prompt").send_keys(prompt + "\ue007")


def answered(page: Any) -> Callable[[], bool]:
    return lambda: bool(page.find_elements("css selector", ".answer:not(.busy)"))


def test_an_answer_streams_and_tells_how_it_was_served(page: Any) -> None:
    ask_for_text(page, "Once upon a time", 40)
    wait_until(lambda: "≈" in text(page, ".facts"), "tokens on their way")
    assert find(page, "#stop").is_displayed()
    wait_until(answered(page), "the answer")
    facts = text(page, ".facts")
    assert "40 out" in facts
    assert "batch" in facts
    assert "alone" in facts
    assert "max tokens" in facts
    speed = float(facts.split("speed")[1].split("tokens/s")[0])
    assert 0.3 / STEP < speed <= 1.05 / STEP
    assert len(text(page, ".answer-text")) > 40
    assert text(page, "#status") == "ready"


def test_the_batch_of_an_answer_counts_the_others(page: Any, server: FakeServer) -> None:
    with streams(server, 3, max_tokens=1500):
        ask_for_text(page, "Once", 20)
        wait_until(answered(page), "the answer")
    assert "4 (max 4)" in text(page, ".facts")


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request_on_the_server(page: Any, server: FakeServer, how: str) -> None:
    cancelled = metric(server.url, "slimserve_requests_total", model="fake", ending="cancelled")
    ask_for_text(page, "Go on", 2000)
    wait_until(lambda: "≈" in text(page, ".facts"), "tokens on their way")
    if how == "button":
        find(page, "#stop").click()
    else:
        page.switch_to.active_element.send_keys("\ue00c")
    wait_until(answered(page), "the end")
    assert "stopped" in text(page, ".facts")
    wait_until(
        lambda: metric(server.url, "slimserve_requests_total", model="fake", ending="cancelled") > cancelled, "a cancel"
    )


def test_a_refusal_is_shown_in_the_servers_words(page: Any) -> None:
    ask_for_text(page, "Hello", 99_999)
    wait_until(lambda: "max_tokens asks for" in text(page, ".answer .error"), "the refusal")
    (complaint,) = complaints(page)
    assert "400" in complaint


def test_code_is_the_request_and_runs(page: Any, tmp_path: Path) -> None:
    ask_for_text(page, """Quotes: ' " and \\ and ü""", 4)
    wait_until(answered(page), "the answer")
    find(page, "#code").click()
    curl = text(page, "#code-text")
    found = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=60, check=True).stdout
    assert found.endswith("data: [DONE]\n\n")
    find(page, "[data-language=python]").click()
    script = tmp_path / "asked.py"
    script.write_text(text(page, "#code-text"))
    whole = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=True).stdout
    assert len(whole) >= 4
    find(page, "#code-dialog [data-close]").click()


def test_everything_can_be_reached_by_keyboard(page: Any) -> None:
    seen = set()
    for _ in range(30):
        page.switch_to.active_element.send_keys("\ue004")
        name, tag, ring = page.execute_script(
            "const at = document.activeElement; return [at.id, at.tagName, getComputedStyle(at).outlineStyle]"
        )
        seen.add(name)
        assert ring != "none" or name == "prompt" or tag in ("INPUT", "BODY"), name
    wanted = {"to-playground", "to-dashboard", "theme-button", "turns", "prompt", "code", "send", "model", "seed"}
    assert wanted <= seen


def test_the_dashboard_follows_the_load(page: Any, server: FakeServer) -> None:
    find(page, "#to-dashboard").click()
    with streams(server, 4, max_tokens=2000):
        wait_until(lambda: "\n4\n" in text(page, ".tile:nth-child(2)"), "four running")
        wait_until(lambda: "ms" in text(page, ".tile:nth-child(3)"), "a first token's time")
        wait_until(lambda: 3 < float(text(page, ".tile:nth-child(5) b")) <= 4, "their batch")
        output = float(text(page, ".tile:nth-child(1) b"))
        assert 4 * 0.2 / STEP < output <= 4 * 1.1 / STEP
        choose(page, "#filter", "other")
        wait_until(lambda: "\n0\n" in text(page, ".tile:nth-child(2)"), "nothing of the other model")
    rows = text(page, "#models tbody tr").splitlines()
    assert [row.split()[:2] for row in rows] == [["fake", "ready"], ["other", "ready"]]
    assert len(page.find_elements("css selector", ".chart canvas")) == 6


def test_a_server_that_goes_is_told(chromium: Any, tmp_path: Path) -> None:
    with fake_server(tmp_path, configuration("fake")) as going:
        page = visit(chromium, going.url)
        assert text(page, "#status") == "ready"
    wait_until(lambda: text(page, "#status") == "not reachable", "the loss")
    complaints(page)


@pytest.mark.parametrize("view", ["playground", "dashboard"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(page: Any, view: str, scheme: str) -> None:
    resize(page, 360, 740, scheme=scheme)
    find(page, f"#to-{view}").click()
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    cut = page.execute_script(
        "return [...document.querySelectorAll('button, a, select, input')].filter((each) => each.checkVisibility())"
        ".filter((each) => each.getBoundingClientRect().right > 360).map((each) => each.outerHTML)"
    )
    assert cut == []
    ground = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, ground.removeprefix("rgb(").removesuffix(")").split(","))) / 3
    assert (brightness < 64) == (scheme == "dark")


def test_percentiles_are_prometheus_own(page: Any) -> None:
    """Within a bucket by interpolation, and the last bound beyond it."""
    script = """
        const [cases, done] = arguments;
        import("/web/history.js").then(({ quantile }) => done(cases.map((each) => quantile(...each))));
    """
    cases = [
        (0.5, [1, 2, 4], [0, 10, 10, 10]),
        (0.75, [1, 2, 4], [4, 4, 8, 8]),
        (0.99, [1, 2, 4], [0, 0, 1, 100]),
        (0.5, [1, 2, 4], [0, 0, 0, 0]),
    ]
    assert page.execute_async_script(script, cases) == [1.5, 3, 4, None]


def test_a_key_is_asked_for_and_kept_nowhere(chromium: Any, tmp_path: Path) -> None:
    with fake_server(tmp_path, configuration(*MODELS, api_key="sesame")) as locked:
        page = visit(chromium, locked.url)
        wait_until(lambda: find(page, "#key-dialog").is_displayed(), "the question")
        find(page, "#key").send_keys("wrong\ue007")
        wait_until(lambda: "does not know" in text(page, "#key-error"), "the refusal")
        find(page, "#key").send_keys("sesame\ue007")
        wait_until(lambda: not find(page, "#key-dialog").is_displayed(), "the way in")
        ask_for_text(page, "Once", 5)
        wait_until(lambda: "5 out" in text(page, ".facts"), "an answer")
        find(page, "#code").click()
        assert "$SLIMSERVE_API_KEY" in text(page, "#code-text")
        kept = page.execute_script(
            "return JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, document.body.innerHTML,"
            " [...document.querySelectorAll('input')].map((each) => each.value), location.href])"
        )
        assert "sesame" not in kept
        assert json.loads(kept)[:3] == [{}, {}, ""]
        page.refresh()
        wait_until(lambda: find(page, "#key-dialog").is_displayed(), "the question again")
        page.get("about:blank")
    complaints(chromium)


def test_the_policy_holds_in_the_browser(page: Any) -> None:
    """A script or a style that somebody slipped into the page does not run."""
    page.execute_script(
        "const style = document.createElement('style'); style.textContent = 'body { opacity: 0.5 }';"
        "document.head.append(style);"
        "try { document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.owned=1>'); } catch { }"
    )
    assert page.execute_script("return [getComputedStyle(document.body).opacity, window.owned]") == ["1", None]
    assert any("Content Security Policy" in each for each in complaints(page))
    assert set(FILES) >= {"/", "/web/app.js"}


def test_gpus_are_shown_as_far_as_their_driver_tells(chromium: Any, tmp_path: Path) -> None:
    """No GPU is needed: the gauges hold what a sample of one would put there."""
    resize(chromium, 1280, 900)
    with serving(write_model(tmp_path / "model")) as running:
        gauges = running.state.metrics.families.gauges
        for gpu in ("cuda:0", "cuda:1"):
            gauges["gpu_info"].labels(gpu, "NVIDIA H200", f"GPU-{gpu}", "570").set(1)
        sample = GpuSample(utilization=0.8, memory_used=60e9, memory_total=120e9, power=350.0)
        shown = GpuMetrics(running.state.metrics.families)
        shown.show("cuda:0", sample)
        shown.show("cuda:1", sample)
        shown.close()
        page = visit(chromium, running.url)
        find(page, "#to-dashboard").click()
        wait_until(lambda: "120 GB, 700 W" in text(page, ".tile:nth-child(7)"), "both GPUs")
        assert "80 %" in text(page, ".tile:nth-child(7)")
        wait_until(
            lambda: "busy 80 %\nmemory 50 %\nSMs –" in text(page, ".chart:nth-child(7) .legend span"), "their chart"
        )
        page.get("about:blank")
    assert complaints(chromium) == []


def test_a_real_model_chats(chromium: Any, real_server: Server) -> None:
    resize(chromium, 1280, 900)
    page = visit(chromium, real_server.url)
    write(page, "#temperature", "0")
    write(page, "#max_tokens", "24")
    find(page, "#prompt").send_keys("What is the capital of France?\ue007")
    wait_until(answered(page), "the answer")
    assert "Paris" in text(page, ".answer-text")
    page.get("about:blank")
    assert complaints(chromium) == []
