"""``slimserve serve`` in a process of its own with the fake engine, whose tokens cost nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.servers import free_port, slimserve

PATIENCE = 60.0
"""Seconds until a test gives up waiting for something that takes a fraction of one."""
LATE = 3.0
"""Seconds that a loaded machine may take on top of a time which a test measures from outside: to let the processes run
that are to act, and the test itself."""


def wait_until(condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> float:
    """Seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < patience, f"waited for {what} in vain"
        time.sleep(0.02)
    return time.monotonic() - started


class FakeServer:
    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def wait_ready(self) -> None:
        def up() -> bool:
            assert self.process.poll() is None, self.log
            return self.ready()

        wait_until(up, "readiness")

    def workers(self) -> list[psutil.Process]:
        return workers_of(self.process)

    def body(self, model: str = "fake", **fields: Any) -> dict[str, Any]:
        return {"model": model, "prompt": [1, 2, 3], "max_tokens": 20, "ignore_eos": True, **fields}

    def complete(self, model: str = "fake", **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=self.body(model, **fields), timeout=PATIENCE)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(PATIENCE)


def workers_of(server: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [child for child in psutil.Process(server.pid).children() if _is_worker(child)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "server.worker.main" in process.cmdline()
    except psutil.NoSuchProcess:  # it ends just now
        return False


def configuration(*models: str, **options: Any) -> str:
    """YAML of fake models; a model is ``name`` or ``name key=value ...``."""
    entries = []
    for model in models:
        name, *pairs = model.split()
        entries.append({"name": name, "kind": "fake"} | {key: json.loads(value) for key, value in map(_pair, pairs)})
    return json.dumps({"models": entries, **options})


def _pair(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    return key, value


@contextlib.contextmanager
def fake_server(
    folder: Path,
    config: str,
    *arguments: str,
    ready: bool = True,
    log: Path | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[FakeServer]:
    """``environment`` comes on top of this process's own, less what is Slimserve's."""
    (folder / "config.yaml").write_text(config)
    log = log or folder / "log"
    port = free_port()
    command = slimserve("serve", "--config", str(folder / "config.yaml"), "--port", str(port), *arguments)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=_environment() | (environment or {})
        )
    server = FakeServer(process, port, log)
    try:
        if ready:
            server.wait_ready()
        yield server
    finally:
        process.kill()
        process.wait()


def sabotage(folder: Path, code: str) -> dict[str, str]:
    """Environment of a server whose processes run ``code`` when they start: engines that break in a wanted way."""
    (folder / "sitecustomize.py").write_text(textwrap.dedent(code))
    return {"PYTHONPATH": os.pathsep.join((str(folder), str(Path(__file__).parents[2])))}


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("SLIMSERVE_")}


class Stream:
    """One SSE stream, read to its end by ``events``."""

    def __init__(self, client: httpx.Client, response: httpx.Response) -> None:
        self._client = client
        self.response = response
        self._lines = response.iter_lines()

    def first_event(self) -> str:
        return next(line for line in self._lines if line.startswith("data: "))

    def rest(self) -> list[str]:
        return [line.removeprefix("data: ") for line in self._lines if line.startswith("data: ")]

    def close(self) -> None:
        self.response.close()
        self._client.close()


@contextlib.contextmanager
def streams(server: FakeServer, count: int, model: str = "fake", **fields: Any) -> Iterator[list[Stream]]:
    """Open streams whose first token has come."""
    opened: list[Stream] = []
    try:
        for _ in range(count):
            client = httpx.Client(timeout=PATIENCE)
            body = server.body(model, stream=True, **fields)
            request = client.build_request("POST", f"{server.url}/v1/completions", json=body)
            response = client.send(request, stream=True)
            assert response.status_code == 200, response.read()
            opened.append(Stream(client, response))
        for stream in opened:
            stream.first_event()
        yield opened
    finally:
        for stream in opened:
            stream.close()
