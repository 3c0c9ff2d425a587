"""``slimserve bench serve`` against our own server, whose fake engine takes a known time for each step."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.bench.arrivals import Lengths
from server.bench.load import Load, find_target, measure
from server.bench.run import Target, run_load
from server.bench.wire import Ask
from server.errors import CommandFailed
from tests.integration.fake_server import FakeServer, configuration, fake_server
from tests.metrics_text import metric, wait_until

STEP = 0.02
MODEL = f"fake fake_step_seconds={STEP}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with fake_server(tmp_path_factory.mktemp("bench"), configuration(MODEL)) as running:
        yield running


def bench(server: FakeServer, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "server.cli", "bench", "serve", server.url, "--vocab", "256", *arguments]


def run(server: FakeServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(bench(server, *arguments), capture_output=True, text=True, timeout=100, check=False)


def figures(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


class Means:
    """What the server itself measured since this was made."""

    def __init__(self, server: FakeServer) -> None:
        self._url = server.url
        self._before = {name: self._read(name) for name in ("inter_token_seconds", "time_to_first_token_seconds")}

    def _read(self, name: str) -> tuple[float, float]:
        return metric(self._url, f"slimserve_{name}_sum"), metric(self._url, f"slimserve_{name}_count")

    def mean(self, name: str) -> float:
        (total, count), (total_before, count_before) = self._read(name), self._before[name]
        return (total - total_before) / (count - count_before)


def test_an_open_loop_finds_the_engine_s_step_time(server: FakeServer, tmp_path: Path) -> None:
    options = ["--rate", "15", "--requests", "40", "--input", "8-16", "--output", "10-20", "--seeds", "2"]
    server_s = Means(server)
    answer = run(server, *options, "--slo", "ttft=5s,tpot=1s", "--json", str(tmp_path / "figures.json"))
    assert answer.returncode == 0, answer.stderr
    assert "time per output token" in answer.stdout
    found = figures(tmp_path / "figures.json")
    assert found["settings"]["rate"] == 15
    # A token takes a step, and the first one at least its own. A busy machine is slower; the server then says so too.
    assert STEP <= found["median"]["tpot"]["p50"] < 2 * max(STEP, server_s.mean("inter_token_seconds"))
    assert STEP <= found["median"]["ttft"]["p50"] < 2 * max(10 * STEP, server_s.mean("time_to_first_token_seconds"))
    assert found["median"]["ttft"]["p99"] is None
    for seed in found["seeds"]:
        assert (seed["requests"], seed["complete"], seed["good"], seed["uncounted"]) == (40, 40, 40, 0)
        assert seed["metrics"]["e2e"]["p50"] > seed["metrics"]["ttft"]["p50"] + 9 * STEP * 0.9
        assert 4 < seed["requests_per_second"] < 25


def test_a_closed_loop_keeps_its_streams_busy(server: FakeServer, tmp_path: Path) -> None:
    options = ["--concurrency", "6", "--requests", "24", "--input", "8", "--output", "12", "--seeds", "1"]
    server_s = Means(server)
    answer = run(server, *options, "--prompt", "chat", "--json", str(tmp_path / "figures.json"))
    assert answer.returncode == 0, answer.stderr
    (seed,) = figures(tmp_path / "figures.json")["seeds"]
    assert seed["complete"] == 24
    assert seed["client"]["late_p99"] is None
    # Six streams make at most six tokens a step.
    assert seed["output_tokens_per_second"] <= 6 / STEP
    assert seed["output_tokens_per_second"] > 6 / max(STEP, server_s.mean("inter_token_seconds")) / 4


def test_ctrl_c_shows_what_there_is(server: FakeServer) -> None:
    def ended() -> float:
        return metric(server.url, "slimserve_requests_total", ending="length")

    options = ["--rate", "10", "--requests", "2000", "--input", "8", "--output", "4", "--seeds", "1"]
    before = ended()
    with subprocess.Popen(bench(server, *options), stdout=subprocess.PIPE, text=True) as process:
        # The first is a probe. Of ten more the clients have heard of some.
        wait_until(lambda: ended() >= before + 11, 100)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "time to first token" in output
    assert "interrupted" in output


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--rate", "1", "--vocab", "4000000"], 1, "the server refuses a request: 400"),
        (["--rate", "1", "--model", "other"], 1, "the server refuses a request: 404"),
        (["--rate", "1", "--input", "no"], 2, "--input no"),
        ([], 2, "say how requests come"),
        (["--trace", "nothing.csv"], 2, "nothing.csv cannot be read"),
    ],
)
def test_mistakes_are_one_line(server: FakeServer, arguments: list[str], status: int, message: str) -> None:
    answer = run(server, *arguments)
    assert answer.returncode == status
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_no_server_is_one_line() -> None:
    with pytest.raises(CommandFailed, match="no server answers"):
        find_target("http://127.0.0.1:9", None, None)


def target_of(server: FakeServer, **fields: Any) -> Target:
    return find_target(server.url, None, None, **{"vocab": 256} | fields)


def test_a_request_that_is_refused_or_late_is_a_miss(server: FakeServer) -> None:
    too_long = Load(requests=3, inputs=Lengths(5000, 5000), outputs=Lengths(2, 2), concurrency=1)
    summary, _ = measure(target_of(server), too_long, 0, clients=4, slo={})
    assert summary is not None
    assert (summary.errors, summary.good) == ({"http 400": 3}, 0)
    assert "context" in summary.details["http 400"]
    slow = Load(requests=2, inputs=Lengths(4, 4), outputs=Lengths(200, 200), rate=50)
    summary, _ = measure(target_of(server, timeout=0.5), slow, 0, clients=1, slo={})
    assert summary is not None
    assert summary.errors == {"timeout": 2}


def test_a_server_that_is_gone_gives_failures_and_no_crash(server: FakeServer) -> None:
    gone = Target(url="http://127.0.0.1:9/v1", model="fake")
    gathered = run_load(gone, [Ask(0.0, 4, 4)] * 5, clients=2)
    assert [outcome.error for outcome in gathered.outcomes] == ["no connection"] * 5
    assert len(gathered.healths) == 2


def test_overload_is_told_apart_from_failure(tmp_path: Path) -> None:
    with fake_server(tmp_path, configuration(MODEL, max_queue=4)) as server:
        load = Load(requests=30, inputs=Lengths(4, 4), outputs=Lengths(20, 20), rate=200)
        summary, _ = measure(target_of(server), load, 0, clients=4, slo={"e2e": 5.0})
    assert summary is not None
    assert summary.refused["http 503"] == 30 - summary.complete
    assert summary.errors == {}
    assert 4 <= summary.complete == summary.good < 30
