"""Runs a load: one set of client processes a seed, their outcomes gathered as they come."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import msgspec

from server.bench.wire import Ask, Done, Finished, FromClient, Health, Job, Outcome, PromptKind, Ready, Start
from server.errors import CommandFailed

HEAD_START = 0.2
"""Seconds from the word to start to the start, so that it reaches every client in time."""
STOP_PATIENCE = 5.0

_decode = msgspec.json.Decoder(FromClient).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server, and what every request to it says. ``Job`` tells what the fields are."""

    url: str
    model: str
    api_key: str | None = None
    prompt: PromptKind = "ids"
    vocab: int = 32000
    temperature: float = 0.6
    ignore_eos: bool = True
    timeout: float = 600.0


@dataclass(slots=True)
class Gathered:
    outcomes: list[Outcome]
    healths: list[Health]
    interrupted: bool = False

    def take(self, message: FromClient | None) -> None:
        match message:
            case Done(outcome):
                self.outcomes.append(outcome)
            case Finished(health):
                self.healths.append(health)


class ClientProcess:
    """One ``server.bench.client``. Ctrl-C does not reach it: it stops when its standard input ends."""

    def __init__(self, job: Job, heard: Callable[[ClientProcess, FromClient | None], None]) -> None:
        self.finished = False
        self._heard = heard
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "server.bench.client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self.tell(job)

    def tell(self, message: Job | Start) -> None:
        """A client that is gone does not hear it; ``heard`` is told of its end."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join()
        self._errors.close()

    def last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._heard(self, _decode(line))
        self._heard(self, None)


def run_load(
    target: Target,
    asks: Sequence[Ask],
    *,
    clients: int,
    concurrency: int = 0,
    on_progress: Callable[[int], None] = lambda ended: None,
) -> Gathered:
    """Make all requests, each at its time, or in a closed loop of ``concurrency`` streams.

    ``on_progress`` hears how many requests have ended. Ctrl-C ends it early and gives what there is. Raises
    CommandFailed when a client process dies.
    """
    clients = min(clients, concurrency or clients, len(asks))
    news: queue.SimpleQueue[tuple[ClientProcess, FromClient | None]] = queue.SimpleQueue()
    gathered = Gathered([], [])
    processes: list[ClientProcess] = []
    try:
        for job in _jobs(target, asks, clients, concurrency):
            processes.append(ClientProcess(job, lambda process, message: news.put((process, message))))
        for message in _messages(news, processes):
            if isinstance(message, Ready):
                clients -= 1
                if not clients:
                    start = Start(time.monotonic() + HEAD_START)
                    for process in processes:
                        process.tell(start)
            else:
                gathered.take(message)
                on_progress(len(gathered.outcomes))
    except KeyboardInterrupt:
        gathered.interrupted = True
    finally:
        for process in processes:
            process.close()
    while gathered.interrupted and not news.empty():
        gathered.take(news.get()[1])
    return gathered


def _messages(
    news: queue.SimpleQueue[tuple[ClientProcess, FromClient | None]], processes: Sequence[ClientProcess]
) -> Iterator[FromClient]:
    """Until every client has finished."""
    while not all(process.finished for process in processes):
        process, message = news.get()
        if message is not None:
            process.finished = process.finished or isinstance(message, Finished)
            yield message
        elif not process.finished:
            raise CommandFailed(f"a client process died: {process.last_words()}")


def _jobs(target: Target, asks: Sequence[Ask], clients: int, concurrency: int) -> list[Job]:
    """Requests and streams dealt out in turn, so that each client has its share of every moment."""
    streams = [concurrency // clients + (index < concurrency % clients) for index in range(clients)]
    return [
        Job(
            url=target.url,
            model=target.model,
            api_key=target.api_key,
            prompt=target.prompt,
            vocab=target.vocab,
            temperature=target.temperature,
            ignore_eos=target.ignore_eos,
            timeout=target.timeout,
            concurrency=streams[index],
            asks=list(asks[index::clients]),
        )
        for index in range(clients)
    ]
