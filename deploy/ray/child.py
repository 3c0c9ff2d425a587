"""``slimserve serve`` as a child of one Ray replica: started, told which models to serve, watched, ended."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from server.errors import EngineUnavailable
from server.settings import ModelSettings, Settings, load_settings

log = logging.getLogger(__name__)

_END_WITH_PARENT = """
exec 3<&0
"$@" 3<&- & server=$!
{ cat <&3 > /dev/null; kill -TERM "$server" 2> /dev/null; } &
wait "$server"
"""
"""For ``sh``, whose standard input is a pipe that ends with the replica, however that dies: so does the server."""
_OWN = ("host", "port", "metrics_host", "metrics_port", "tls_cert", "tls_key", "cors_origins")
"""Settings of the file that this module or Ray's proxy decides."""
_POLL = 0.1
"""Seconds between two looks at whether models are loaded."""
_ENDING = 15.0
"""Seconds that the processes may take on top of the grace time of open requests."""


class Child:
    """The server process. All methods run on one asyncio loop."""

    def __init__(self, config: Path) -> None:
        """``config`` is a file as ``slimserve serve --config`` takes it. Raises UsageError for a wrong one."""
        self.settings: Settings = load_settings({}, config=config)
        with config.open() as file:
            self._options: dict[str, Any] = {
                key: value for key, value in (yaml.safe_load(file) or {}).items() if key not in _OWN
            }
        self._folder = tempfile.TemporaryDirectory(prefix="slimserve-ray-")
        self._config = Path(self._folder.name, "config.yaml")
        self._process: asyncio.subprocess.Process | None = None
        self._changing = asyncio.Lock()
        self._port = _free_port()
        self.http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self._port}", timeout=None, limits=httpx.Limits(max_connections=None)
        )

    @property
    def locked(self) -> bool:
        """Requests need a key."""
        return not self.settings.tenant_table().open

    async def start(self, patience: float) -> None:
        """Until all models of the file are loaded. Raises EngineUnavailable after ``patience`` seconds or a failure."""
        self._write(())
        server = [sys.executable, "-P", "-m", "server.cli", "serve", "--config", str(self._config)]
        server += ["--host", "127.0.0.1", "--port", str(self._port)]
        self._process = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", _END_WITH_PARENT, "sh", *server, stdin=asyncio.subprocess.PIPE, env=_environment()
        )
        await _within(patience, self._until_loaded(self.settings.models))

    async def serve_also(self, models: Sequence[ModelSettings], patience: float) -> None:
        """Serve these beside the models of the file, and no others; until they are loaded.

        Raises EngineUnavailable when one cannot be, or not in ``patience`` seconds.
        """
        await _within(patience, self._change(models))

    async def _change(self, models: Sequence[ModelSettings]) -> None:
        async with self._changing:
            self._write(models)
            await self._reload()
            await self._until_loaded(models)

    async def check(self) -> None:
        """Raises httpx.HTTPError when only a new start could help."""
        answer = await self.http.get("/health/live", timeout=10)
        answer.raise_for_status()

    async def stop(self) -> None:
        """Open requests finish within the grace time; then nothing is left of the server."""
        await self.http.aclose()
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), self.settings.grace + _ENDING)
            except TimeoutError:
                log.error("the server does not end; its shell is killed")
                process.kill()
        self._folder.cleanup()

    def _write(self, models: Sequence[ModelSettings]) -> None:
        entries = [entry.model_dump(mode="json", exclude_unset=True) for entry in (*self.settings.models, *models)]
        self._config.write_text(json.dumps(self._options | {"models": entries}))

    async def _reload(self) -> None:
        key = self.settings.admin_key
        headers = {} if key is None else {"authorization": f"Bearer {key.get_secret_value()}"}
        while True:
            answer = await self.http.post("/admin/reload", headers=headers)
            if answer.status_code != 409:
                break
            await asyncio.sleep(_POLL)  # the reload before this one goes on
        if answer.status_code != 200:
            raise EngineUnavailable("The model cannot be served here.", log=answer.text, retry_after=30)

    async def _until_loaded(self, models: Sequence[ModelSettings]) -> None:
        names = [model.served_name for model in models]
        while True:
            if await self._loaded(names):
                return
            await asyncio.sleep(_POLL)

    async def _loaded(self, names: Sequence[str]) -> bool:
        """Raises EngineUnavailable where the server ended or one of the models failed."""
        if self._process is None or self._process.returncode is not None:
            raise EngineUnavailable("The server process ended.", retry_after=30)
        try:
            models = (await self.http.get("/health/ready", timeout=10)).json()["models"]
        except httpx.TransportError:
            return False  # it does not listen yet
        states = {model["name"]: model["state"] for model in models}
        if "failed" in (states.get(name) for name in names):
            raise EngineUnavailable("The model cannot be served here.", log=str(models), retry_after=30)
        return all(states.get(name) == "ready" for name in names)


async def _within(seconds: float, work: Coroutine[Any, Any, None]) -> None:
    try:
        await asyncio.wait_for(work, seconds)
    except TimeoutError:
        raise EngineUnavailable("The model did not load in time.", retry_after=30) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment() -> dict[str, str]:
    """The server is imported from where this process has it, whatever Ray made of the working directory."""
    root = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
