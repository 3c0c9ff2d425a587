"""A real server process with SmolLM2 behind it, shared by the tests of a session."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.servers import Server, free_port, running, slimserve


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_reaches_children() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored, and so would everything be that tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    from server.catalog import resolve

    return resolve("smollm2-135m")


@pytest.fixture(scope="session")
def real_server(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``slimserve serve`` in a process of its own, in fp32 on the CPU; the model is called ``smollm2``."""
    port = free_port()
    command = slimserve("serve", str(smollm2_path), "--port", str(port), "--served-model-name", "smollm2")
    command += ["--device", "cpu", "--max-batch", "32", "--max-model-len", "2048"]
    log = tmp_path_factory.mktemp("server") / "log"
    with running("slimserve", command, port, "/health/ready", log=log) as server:
        yield server
