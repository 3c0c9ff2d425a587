"""Start one worker process and end it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import sysconfig
import tempfile
from pathlib import Path

import msgspec

from server.scheduler.config import SchedulerConfig

STOP_TIMEOUT = 2.0
"""Seconds that a worker has to follow a stop message."""


class RuntimeFolder:
    """A folder that only this user can enter, for the sockets; a fresh address for each incarnation."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="slimserve-"))

    def address(self, worker: int, incarnation: int) -> str:
        return f"ipc://{self.path}/{worker}-{incarnation}"

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class WorkerProcess:
    """One running worker. Its standard input is a pipe that dies with this process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(
        cls, address: str, incarnation: int, record: int, config: SchedulerConfig, log_level: str
    ) -> WorkerProcess:
        """``record`` is the descriptor of its flight record. Raises OSError when the machine has no room for it.

        ``-P`` and an explicit path: a ``server`` or ``torch`` in the working directory is never imported.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "server.worker.main", address, str(incarnation)),
            *("--flight-record", str(record)),
            *("--scheduler-config", msgspec.json.encode(config).decode(), "--log-level", log_level),
            stdin=asyncio.subprocess.PIPE,
            pass_fds=(record,),
            env=_environment(),
            # A session of its own: Ctrl-C in the terminal does not reach it before the drain.
            start_new_session=True,
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> str:
        """How it ended, for the log."""
        code = await self._process.wait()
        return f"it ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with status {code}"

    def kill(self) -> None:
        """Safe at any time; also ends a stopped process."""
        if self._process.returncode is None:
            self._process.kill()

    async def end(self) -> None:
        """Kill and reap."""
        self.kill()
        await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def _environment() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key.upper() != "SLIMSERVE_API_KEY"}
    root = str(Path(__file__).parents[2])
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    return environment
