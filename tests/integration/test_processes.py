"""Life and death of the processes, with real ones: kill, stall, drain, restart."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.servers import slimserve
from tests.integration.fake_server import LATE, PATIENCE, FakeServer, configuration, fake_server, streams, wait_until
from tests.metrics_text import metric

ENDLESS: dict[str, Any] = {"max_tokens": 2000}
SLOW = "fake fake_step_seconds=0.01"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    """For a test that ends it."""
    with fake_server(tmp_path, configuration(SLOW)) as running:
        yield running


@pytest.fixture(scope="module")
def lasting_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with fake_server(tmp_path_factory.mktemp("server"), configuration(SLOW, step_timeout=2)) as running:
        yield running


@pytest.fixture
def lasting(lasting_server: FakeServer) -> FakeServer:
    """For tests that leave it, or let it become, as it was."""
    lasting_server.wait_ready()
    assert lasting_server.complete().status_code == 200
    return lasting_server


def errors_in(events: list[str]) -> list[dict[str, object]]:
    return [json.loads(event)["error"] for event in events if event != "[DONE]" and "error" in json.loads(event)]


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def breaks_off(server: FakeServer) -> None:
    with contextlib.suppress(httpx.TransportError):
        server.complete()


def test_killed_api_process_takes_the_worker_with_it(server: FakeServer) -> None:
    with streams(server, 2, **ENDLESS):
        [worker] = server.workers()
        folder = socket_folder(worker)
        assert folder.stat().st_mode & 0o077 == 0
        server.process.kill()
        assert wait_until(lambda: gone(worker), "the worker to follow") < 2 + LATE
        assert not folder.exists()


def socket_folder(worker: psutil.Process) -> Path:
    [address] = [argument for argument in worker.cmdline() if argument.startswith("ipc://")]
    return Path(address.removeprefix("ipc://")).parent


def test_killed_api_process_takes_a_worker_inside_a_long_step_with_it(tmp_path: Path) -> None:
    with fake_server(tmp_path, configuration("fake fake_step_seconds=600")) as server:
        request = threading.Thread(target=breaks_off, args=(server,))
        request.start()
        [worker] = server.workers()
        wait_until(lambda: metric(server.url, "slimserve_requests_running") == 1, "the step to begin")
        server.process.kill()
        assert wait_until(lambda: gone(worker), "the worker to follow") < 2 + LATE
        request.join(PATIENCE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_open_streams_finish_and_exits_0(server: FakeServer, number: signal.Signals) -> None:
    with streams(server, 3, max_tokens=100) as opened:
        workers = server.workers()
        folder = socket_folder(workers[0])
        assert metric(server.url, "slimserve_drain_start_time_seconds") == 0
        server.signal(number)
        wait_until(lambda: not server.ready(), "readiness to go")
        assert 0 <= time.time() - metric(server.url, "slimserve_drain_start_time_seconds") < 60
        refused = server.complete()
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        for stream in opened:
            events = stream.rest()
            assert not errors_in(events)
            assert events[-1] == "[DONE]"
            assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert server.wait() == 0
    assert all(gone(worker) for worker in workers)
    assert not folder.exists()
    assert "Traceback" not in server.log


def test_idle_server_stops_quickly(server: FakeServer) -> None:
    started = time.monotonic()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert time.monotonic() - started < 2 + LATE


def test_what_is_open_after_the_grace_time_ends_with_one_error(tmp_path: Path) -> None:
    with (
        fake_server(tmp_path, configuration(SLOW), "--grace", "300ms") as server,
        streams(server, 2, **ENDLESS) as opened,
    ):
        server.signal(signal.SIGTERM)
        for stream in opened:
            [error] = errors_in(stream.rest())
            assert "shut down" in str(error["message"])
        assert server.wait() == 0


def test_second_signal_exits_at_once(server: FakeServer) -> None:
    with streams(server, 2, **ENDLESS):
        [worker] = server.workers()
        server.signal(signal.SIGINT)
        wait_until(lambda: not server.ready(), "readiness to go")
        started = time.monotonic()
        server.signal(signal.SIGINT)
        assert server.wait() == 130
        assert time.monotonic() - started < 2 + LATE
        wait_until(lambda: gone(worker), "the worker to go")


def test_ctrl_c_in_the_terminal_does_not_reach_the_worker(lasting: FakeServer) -> None:
    [worker] = lasting.workers()
    assert os.getsid(worker.pid) != os.getsid(lasting.process.pid)


def test_step_that_hangs_is_found_though_the_worker_reports(tmp_path: Path) -> None:
    with fake_server(tmp_path, configuration("fake fake_step_seconds=600", step_timeout=1.5)) as server:
        # It hangs among others, again, and alone: then it is the request's fault.
        assert server.complete().status_code == 500
        wait_until(lambda: server.log.count("it settled no step for") == 3, "the reason in the log")


def test_port_in_use_is_said_before_any_model_work(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = slimserve("serve", str(tmp_path), "--port", str(port))
        process = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert process.returncode == 1
    assert f"port {port}" in process.stderr
    assert "in use" in process.stderr
    assert process.stderr.count("\n") == 1


def test_two_models_share_one_worker(tmp_path: Path) -> None:
    with fake_server(tmp_path, configuration("a", "b max_model_len=64")) as server:
        assert len(server.workers()) == 1
        for model in ("a", "b"):
            assert server.complete(model).json()["usage"]["completion_tokens"] == 20
        assert server.complete("b", max_tokens=100).status_code == 400
        assert server.complete("c").status_code == 404
        assert metric(server.url, "slimserve_requests_total", model="b", ending="length") == 1
        assert metric(server.url, "slimserve_decode_seconds_count", model="b") == 1
        assert metric(server.url, "slimserve_cache_config_info", model="b") == 1
        assert metric(server.url, "slimserve_model_kv_bytes", model="b") > 0


def test_no_torch_in_the_api_process(lasting: FakeServer) -> None:
    assert lasting.complete().status_code == 200
    mapped = Path(f"/proc/{lasting.process.pid}/maps").read_text()
    assert "libpython" in mapped or "python" in mapped
    assert "torch" not in mapped


def test_idle_worker_takes_no_core(lasting: FakeServer) -> None:
    assert lasting.complete().status_code == 200
    [worker] = lasting.workers()

    def share() -> float:
        before = worker.cpu_times()
        time.sleep(1.5)
        after = worker.cpu_times()
        return (after.user + after.system - before.user - before.system) / 1.5

    # It counts in hundredths of a second, and a busy machine makes each of them do less.
    assert min(share() for _ in range(3)) < 0.02


def test_worker_given_up_ends_the_server_with_status_1(tmp_path: Path) -> None:
    with fake_server(tmp_path, configuration(SLOW, max_restarts=0)) as server:
        server.workers()[0].kill()
        assert server.wait() == 1
        assert "given up" in server.log


def test_model_that_cannot_be_loaded_ends_the_server_with_status_1_and_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = slimserve("serve", str(tmp_path), "--port", "0")
    process = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert process.returncode == 1
    assert "config.json" in process.stderr
    assert "Traceback" not in process.stderr


def test_code_in_the_working_directory_is_never_run(tmp_path: Path) -> None:
    trap = "import pathlib; pathlib.Path('trapped').touch()"
    for name in ("server.py", "torch.py", "msgspec.py", "sitecustomize.py"):
        (tmp_path / name).write_text(trap)
    root = Path(__file__).resolve().parents[2]
    script = (
        f"import os, sys; sys.path[0] = {str(root)!r}; os.chdir({str(tmp_path)!r}); from server.cli import main; main()"
    )
    (tmp_path / "config.yaml").write_text(configuration(SLOW))
    command = [sys.executable, "-c", script, "serve", "--config", "config.yaml", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        wait_until(lambda: "ready:" in (tmp_path / "log").read_text(), "the server")
    finally:
        process.terminate()
        process.wait(PATIENCE)
    assert not (tmp_path / "trapped").exists()
