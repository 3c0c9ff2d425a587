"""One request and what became of it: an answer, a refusal, a client that left, or a failure."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

Kind = Literal["complete", "refused", "left", "failed"]
Clock = Callable[[], float]

DONE = b"[DONE]"
TIMEOUT = 120.0
"""Seconds without a byte until a client gives up. The server sends a comment every 15 s while a stream waits."""
CHUNK = 1 << 16
REFUSALS = (429, 503)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Times in seconds since the request was sent."""

    kind: Kind
    total: float
    status: int = 0
    """0 where none came."""
    ttft: float | None = None
    """To the first event with text. None without one, and for an answer in one piece."""
    tpot: float | None = None
    """Mean time of a later token: (last - first) / (tokens - 1)."""
    tokens: int = 0
    """Of the answer, as the server's usage counts them."""
    reason: str = ""
    """Of a failure."""


class Failed(Exception):
    """The text is the reason."""


class EventStream:
    """A stream's server-sent events, fed as bytes arrive."""

    def __init__(self) -> None:
        self._rest = b""
        self.first: float | None = None
        self.last = 0.0
        """Times of the first and of the last event with text."""
        self.events = 0
        """Events with text."""
        self.tokens = 0
        self.done = False

    def feed(self, data: bytes, now: float) -> None:
        """Raises Failed on an event that holds an error, or no JSON."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def _event(self, data: bytes, now: float) -> None:
        if data == DONE:
            self.done = True
            return
        event = _json(data)
        if "error" in event:
            raise Failed(f"error in the stream: {_code(event)}")
        if event.get("usage") is not None:
            self.tokens = _tokens(event)
        if any(map(_has_text, event.get("choices", ()))):
            self.first = now if self.first is None else self.first
            self.last = now
            self.events += 1

    def outcome(self, sent: float, now: float) -> Outcome:
        """Of a stream whose connection has ended. Raises Failed where it has no ending, or says nothing."""
        if not self.done:
            raise Failed("a stream without an ending")
        if self.tokens < 1:
            raise Failed("a stream without tokens")
        ttft = None if self.first is None else self.first - sent
        tpot = None
        if self.first is not None and self.tokens > 1:
            tpot = (self.last - self.first) / (self.tokens - 1)
        return Outcome("complete", now - sent, 200, ttft, tpot, self.tokens)


def _json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        raise Failed("no JSON came") from None
    if not isinstance(found, dict):
        raise Failed("no object came")
    return found


def _tokens(body: Mapping[str, Any]) -> int:
    try:
        return int(body["usage"]["completion_tokens"])
    except (KeyError, TypeError, ValueError):
        raise Failed("an answer without usage") from None


def _has_text(choice: Mapping[str, Any]) -> bool:
    """Of a completion or of a chat, reasoning or answer."""
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("content") or delta.get("reasoning_content"))


def _code(body: Mapping[str, Any]) -> str:
    error = body.get("error")
    return str((error.get("code") or error.get("type")) if isinstance(error, dict) else error)[:80]


class Api:
    """An OpenAI-compatible server; ``url`` is its root. Each request has a connection of its own, opened before time
    starts to count."""

    def __init__(self, url: str, key: str | None = None, clock: Clock = time.perf_counter) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is no http or https address")
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._root = parts.hostname, parts.port, parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._clock = clock

    def call(self, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
        """GET, or POST with a body. Raises Failed where the answer is not 200, OSError where none came."""
        connection = self._connection(self._host, self._port, timeout=TIMEOUT)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", self._root + path, payload, self._headers)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise Failed(f"{path} answers {response.status}")
        return _json(data)

    def ask(self, path: str, body: Mapping[str, object], leave_after: int | None = None) -> Outcome:
        """``leave_after`` closes the connection after so many events with text: 0 as soon as the request is sent."""
        connection = self._connection(self._host, self._port, timeout=TIMEOUT)
        sent = self._clock()
        try:
            connection.connect()
            sent = self._clock()
            connection.request("POST", self._root + path, json.dumps(body), self._headers)
            if leave_after == 0:
                return Outcome("left", self._clock() - sent)
            return self._read(connection.getresponse(), bool(body.get("stream")), sent, leave_after)
        except Failed as failure:
            return Outcome("failed", self._clock() - sent, reason=str(failure))
        except TimeoutError:
            return Outcome("failed", self._clock() - sent, reason=f"nothing came for {TIMEOUT:g} s")
        except (OSError, http.client.HTTPException) as error:
            return Outcome("failed", self._clock() - sent, reason=f"connection: {type(error).__name__}")
        finally:
            connection.close()

    def _read(
        self, response: http.client.HTTPResponse, streamed: bool, sent: float, leave_after: int | None
    ) -> Outcome:
        if response.status != 200:
            return self._refused(response, sent)
        if not streamed:
            tokens = _tokens(_json(response.read()))
            return Outcome("complete", self._clock() - sent, 200, tokens=tokens)
        stream = EventStream()
        while data := response.read1(CHUNK):
            stream.feed(data, self._clock())
            if leave_after is not None and stream.events >= leave_after and not stream.done:
                return Outcome("left", self._clock() - sent, 200)
        return stream.outcome(sent, self._clock())

    def _refused(self, response: http.client.HTTPResponse, sent: float) -> Outcome:
        """Raises Failed where it is no refusal that tells when to come back."""
        status, retry_after = response.status, response.getheader("Retry-After", "")
        data = response.read(CHUNK)
        if status not in REFUSALS:
            raise Failed(f"http {status}: {_code(_json(data))}")
        if not retry_after.isdecimal():
            raise Failed(f"http {status} without Retry-After")
        return Outcome("refused", self._clock() - sent, status)
