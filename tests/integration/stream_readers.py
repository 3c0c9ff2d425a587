"""Streams read in threads of their own, so that a test can kill something meanwhile and compare them afterwards."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

PATIENCE = 120.0


class StreamReader:
    """One streamed completion: all its text, when its events came, and how it ended."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.text = ""
        self.tokens: list[str] = []
        """Where ``logprobs`` was asked for."""
        self.finish: str | None = None
        self.done = False
        """``[DONE]`` came, which only a complete answer has."""
        self.error: dict[str, Any] | None = None
        self.status = 0
        self.times: list[float] = []
        """Of each event, by the monotonic clock."""
        self.comments = 0
        self.failure: Exception | None = None
        self._url = url
        self._body = body | {"stream": True}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with (
                httpx.Client(timeout=PATIENCE) as client,
                client.stream("POST", f"{self._url}/v1/completions", json=self._body) as response,
            ):
                self.status = response.status_code
                if self.status != 200:
                    self.error = json.loads(response.read())["error"]
                    return
                for line in response.iter_lines():
                    self._take(line)
        except httpx.HTTPError as failure:
            self.failure = failure

    def _take(self, line: str) -> None:
        if line.startswith(":"):
            self.comments += 1
        elif line == "data: [DONE]":
            self.done = True
        elif line:
            event = json.loads(line.removeprefix("data: "))
            self.times.append(time.monotonic())
            if "error" in event:
                self.error = event["error"]
                return
            [choice] = event["choices"]
            self.text += choice["text"]
            self.tokens += (choice["logprobs"] or {}).get("tokens", ())
            self.finish = choice["finish_reason"] or self.finish

    def events(self) -> int:
        return len(self.times)

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the stream does not end"

    def assert_whole(self) -> None:
        """It ended well."""
        self.join()
        assert self.failure is None, self.failure
        assert self.error is None, self.error
        assert self.done


@contextmanager
def reading(url: str, bodies: Sequence[dict[str, Any]]) -> Iterator[list[StreamReader]]:
    """Streams of which each has had its first event."""
    readers = [StreamReader(url, body) for body in bodies]
    deadline = time.monotonic() + PATIENCE
    while not all(reader.events() or reader.error or reader.failure for reader in readers):
        assert time.monotonic() < deadline, "a stream does not begin"
        time.sleep(0.01)
    yield readers
    for reader in readers:
        reader.join()
