"""Connections of a client process: one request at a time on each, kept for the next one where the server allows."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from server.bench.response import BadResponseError, BodyReader, EventLog

REUSE_WITHIN = 2.0
"""Seconds that an idle connection is trusted: servers close theirs after some seconds, maybe while we send."""
LONGEST_ERROR = 4096


@dataclass(frozen=True, slots=True)
class Address:
    """Where the routes are."""

    host: str
    port: int
    secure: bool
    path: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises ValueError for what is no http or https URL."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is no http:// or https:// URL")
        secure = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if secure else 80), secure, parts.path.rstrip("/"))

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Answer:
    """One response on its way. ``failure`` says why it broke off."""

    def __init__(self) -> None:
        self.body = BodyReader()
        self.log = EventLog()
        self.failure = ""
        self.error_text = b""
        """Body of an answer that is no stream."""
        self.heard = False
        """At least one byte came."""
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def feed(self, data: bytes, now: float) -> None:
        self.heard = True
        body = self.body.feed(data)
        if self.body.status == 200:
            self.log.feed(body, now)
        else:
            self.error_text = (self.error_text + body)[:LONGEST_ERROR]

    def finish(self, failure: str = "") -> None:
        if not self.finished.done():
            self.failure = failure
            self.finished.set_result(None)


class Connection(asyncio.Protocol):
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self.idle_since = 0.0
        self.closed = False
        self.reused = False

    def send(self, request: bytes) -> Answer:
        assert self._transport is not None
        self._answer = Answer()
        self._transport.write(request)
        return self._answer

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:  # nothing was asked: this connection is of no use any more
            self.close()
            return
        try:
            answer.feed(data, self._clock())
        except BadResponseError as error:
            self._finish(f"bad response: {error}")
            self.close()
            return
        if answer.body.done:
            reusable = answer.body.keep_alive
            self._finish()
            if not reusable:
                self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._answer is not None:
            self._answer.body.closed()
            self._finish("" if self._answer.body.done else "connection closed")

    def _finish(self, failure: str = "") -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.finish(failure)


class ConnectionPool:
    """Opens a connection for a request when none is idle."""

    def __init__(self, address: Address, clock: Callable[[], float]) -> None:
        self._address = address
        self._clock = clock
        self._context = ssl.create_default_context() if address.secure else None
        self._idle: list[Connection] = []

    async def exchange(self, request: bytes) -> Answer:
        """Send a request and wait for the end of its answer. Raises OSError where the server cannot be reached."""
        while True:
            connection = await self._take()
            answer = connection.send(request)
            try:
                await answer.finished
            except BaseException:
                connection.close()
                raise
            if not connection.closed:
                connection.idle_since = self._clock()
                self._idle.append(connection)
            # A server may close an idle connection just when it is used again: that is no failure of the request.
            if not (connection.reused and answer.failure and not answer.heard):
                return answer

    async def _take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and self._clock() - connection.idle_since < REUSE_WITHIN:
                connection.reused = True
                return connection
            connection.close()
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: Connection(self._clock), self._address.host, self._address.port, ssl=self._context
        )
        return connection
