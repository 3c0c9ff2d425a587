"""The client's connection, as far as a stream may write to it past ASGI's ``send``."""

from __future__ import annotations

import asyncio

from starlette.types import Scope

_KEY = "line"
"""In the state that the server hands to the application with each request."""


class Line:
    """Writes chunks of a response that has begun, without a coroutine and without waiting.

    ASGI's ``send`` goes through every middleware and the server's HTTP parser for each event, which costs more than
    all the rest of an event but the system call. A chunk of an HTTP/1.1 body needs none of them: its length, and it.
    """

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self.paused = False
        """The transport's buffer is full."""

    def opened(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def write(self, data: bytes) -> bool:
        """Write one chunk, not empty; False where that has to be left to ``send``, which waits or finds out why."""
        transport = self._transport
        if self.paused or transport is None or transport.is_closing():
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True


def with_line(state: dict[str, object], line: Line) -> dict[str, object]:
    """The server's state for the requests of the connection of ``line``."""
    return {**state, _KEY: line}


def line_of(scope: Scope) -> Line | None:
    """Of a request whose answer comes in chunks: None for HTTP/1.0, and under a server that knows no lines."""
    line = scope.get("state", {}).get(_KEY)
    return line if isinstance(line, Line) and scope["http_version"] == "1.1" else None
