"""The locust load test against our own server, whose fake engine's tokens cost nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from loadtests.figures import Figures
from loadtests.run import HERE
from tests.integration.fake_server import FakeServer, configuration, fake_server
from tests.metrics_text import metric, wait_until

pytest.importorskip("gevent", reason='locust is not here: pip install "slimserve[loadtest]"')

ROOT = Path(__file__).resolve().parents[2]
MODEL = "fake fake_step_seconds=0.01"
TRAFFIC = ["--users", "6", "--pace", "3", "--length-scale", "0.02"]
LIMITS = "[all]\nrequests = 10\nfailures_share = 0\n[chat]\nttft_p95_ms = 60000\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with fake_server(tmp_path_factory.mktemp("load"), configuration(MODEL)) as running:
        yield running


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "loadtests.run", *TRAFFIC, *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=200, check=False, cwd=ROOT)


def limits(folder: Path, text: str) -> str:
    file = folder / "limits.toml"
    file.write_text(text)
    return str(file)


def test_a_run_shows_figures_and_writes_a_report(server: FakeServer, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    options = ["--seconds", "5", "--disconnects", "0.2", "--limits", limits(tmp_path, LIMITS), "--report", str(report)]
    answer = run("--url", server.url, *options)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "all limits kept" in answer.stdout
    page = report.read_text()
    assert all(word in page for word in ("TTFT", "TPOT", "TOTAL", "LEFT"))
    assert metric(server.url, "slimserve_requests_total", ending="cancelled") > 0


def test_a_missed_limit_fails_the_run(server: FakeServer, tmp_path: Path) -> None:
    file = limits(tmp_path, "[chat]\nttft_p50_ms = 0\nrequests = 1\n")
    answer = run("--url", server.url, "--seconds", "3", "--limits", file)
    assert answer.returncode == 1
    rows = [line.split() for line in answer.stdout.splitlines() if line.startswith("chat ")]
    assert [row[-1] for row in rows[-2:]] == ["MISSED", "ok"]
    assert "1 limits missed" in answer.stdout


def test_a_fresh_server_is_started_and_stopped(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(configuration(MODEL))
    answer = run("--serve", f"--config {config}", "--seconds", "3", "--limits", limits(tmp_path, LIMITS))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert not [
        process for process in psutil.process_iter(["cmdline"]) if str(config) in (process.info["cmdline"] or ())
    ]


def test_ctrl_c_ends_what_was_started_and_shows_what_there_is(server: FakeServer) -> None:
    before = metric(server.url, "slimserve_requests_total")
    arguments = command("--url", server.url, "--seconds", "500")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        wait_until(lambda: metric(server.url, "slimserve_requests_total") > before + 5, 100)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 130, output
    assert "ttft p50" in output
    assert not [child for child in children if child.is_running()]


def test_plain_locust_runs_the_locustfile(server: FakeServer, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["--headless", "--users", "4", "--run-time", "3s", "--pace", "3", "--length-scale", "0.02"]
    options = ["-f", str(HERE / "locustfile.py"), "--host", server.url, "--figures", str(figures), "--shape", "spike"]
    answer = subprocess.run(
        [str(Path(sys.executable).with_name("locust")), *options, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=tmp_path,
    )
    assert answer.returncode == 0, answer.stderr
    found = {kind: Figures.from_json(each) for kind, each in json.loads(figures.read_text()).items()}
    assert found["all"].complete > 3
    assert found["all"].failed == 0
    assert found["chat"].percentile("ttft", 50) is not None


def test_a_server_that_is_gone_is_one_line(tmp_path: Path) -> None:
    began = time.monotonic()
    answer = run("--url", "http://127.0.0.1:9", "--seconds", "100", "--limits", limits(tmp_path, LIMITS))
    assert answer.returncode == 1
    assert "no run: " in answer.stderr
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limits", "/none.toml"], "--limits: "),
        (["--disconnects", "2"], "--disconnects from 0 to 1"),
        (["--users", "-1"], "1 at least"),
    ],
)
def test_mistakes_are_one_line(options: list[str], message: str) -> None:
    answer = run("--url", "http://127.0.0.1:9", *options)
    assert answer.returncode == 1
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1
