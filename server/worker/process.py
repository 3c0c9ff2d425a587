"""Start one worker process and end it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec

from engines.protocol import EngineKind
from server.worker.engine_status import WorkerSettings
from server.worker.flight_record import FlightRecord

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

    def __init__(self, process: subprocess.Popen[bytes], record: FlightRecord) -> None:
        self.record = record
        """Outlives the process; whoever ends the process closes it."""
        self._process = process
        self._code: asyncio.Future[int] | None = None

    @classmethod
    def start(
        cls, address: str, incarnation: int, settings: WorkerSettings, kind: EngineKind, device: str
    ) -> WorkerProcess:
        """Its first engine will be of ``kind`` and on ``device``: it imports what that needs before it is asked to.

        Raises OSError when the machine has no room for it. Needs no asyncio loop. ``-P`` and an explicit path: a
        ``server`` or ``torch`` in the working directory is never imported.
        """
        record = FlightRecord.create()
        command = [sys.executable, "-P", "-m", "server.worker.main", address, str(incarnation)]
        command += ["--flight-record", str(record.descriptor), "--log-level", settings.log_level]
        command += ["--log-format", settings.log_format]
        command += ["--scheduler-config", msgspec.json.encode(settings.scheduler).decode()]
        command += ["--prepare-kind", kind, "--prepare-device", device]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                pass_fds=(record.descriptor,),
                env=_environment(),
                # A session of its own: Ctrl-C in the terminal does not reach it before the drain.
                start_new_session=True,
            )
        except OSError:
            record.close()
            raise
        return cls(process, record)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> str:
        """How it ended, for the log."""
        code = await self._ended()
        return f"it ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with status {code}"

    def kill(self) -> None:
        """Safe at any time; also ends a stopped process."""
        self._process.kill()

    async def end(self) -> None:
        """Kill and reap."""
        self.kill()
        await self._ended()
        if self._process.stdin is not None:
            self._process.stdin.close()

    async def _ended(self) -> int:
        """The exit status, once it has one. A thread waits for it, which a process that never goes keeps."""
        if self._code is None:
            self._code = asyncio.get_running_loop().create_future()
            arguments = (asyncio.get_running_loop(), self._code)
            threading.Thread(target=self._reap, args=arguments, name=f"reap-{self.pid}", daemon=True).start()
        return await asyncio.shield(self._code)

    def _reap(self, loop: asyncio.AbstractEventLoop, code: asyncio.Future[int]) -> None:
        status = self._process.wait()
        with suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(code.set_result, status)


@dataclass(frozen=True, slots=True)
class FirstWorker:
    """A server's first worker process, started before the server is built. Leaving the context ends it."""

    folder: RuntimeFolder
    """Its address is that of worker 0 in incarnation 1."""
    process: WorkerProcess

    @classmethod
    def start(cls, settings: WorkerSettings, kind: EngineKind, device: str) -> FirstWorker:
        """As ``WorkerProcess.start``."""
        folder = RuntimeFolder()
        try:
            return cls(folder, WorkerProcess.start(folder.address(0, 1), 1, settings, kind, device))
        except OSError:
            folder.remove()
            raise

    def __enter__(self) -> FirstWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.folder.remove()


def _environment() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key.upper() != "SLIMSERVE_API_KEY"}
    root = str(Path(__file__).parents[2])
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    return environment
