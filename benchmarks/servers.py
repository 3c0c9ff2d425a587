"""Start a server for a benchmark, wait until it serves, stop it again."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.model_configs import MODEL_LEN, QUANTIZED, config_folder


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    """What it prints."""

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(
    name: str,
    command: Sequence[str],
    port: int,
    ready_path: str,
    *,
    env: Mapping[str, str] | None = None,
    log: Path,
    timeout: float = 300,
    own_session: bool = False,
) -> Iterator[Server]:
    """Raises RuntimeError with the end of the log when the server dies or is not ready in ``timeout`` seconds. In a
    session of its own it does not hear the terminal's Ctrl-C, only the end of this context."""
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command), stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=own_session
        )
    try:
        deadline = time.monotonic() + timeout
        while not _ready(url + ready_path):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield Server(name, url, process, log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def slimserve(*arguments: str) -> list[str]:
    """The command line of this environment's own ``slimserve``."""
    return [sys.executable, "-m", "server.cli", *arguments]


@contextlib.contextmanager
def random_weights_server(model: str, dtype: str) -> Iterator[Server]:
    """``slimserve serve`` with the shapes of ``model``, which it calls ``random``. Experts are drawn uniformly."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entry: dict[str, object] = {
            "name": "random",
            "source": str(config_folder(folder, model, dtype)),
            "random_weights": 0,
        }
        entry |= {
            "dtype": "bfloat16" if dtype in QUANTIZED else dtype,
            "max_model_len": MODEL_LEN,
            "uniform_routing": True,
        }
        config = folder / "config.yaml"
        config.write_text(json.dumps({"models": [entry]}))
        port = free_port()
        command = slimserve("serve", "--config", str(config), "--port", str(port))
        with running("slimserve", command, port, "/health/ready", log=folder / "log") as server:
            yield server
