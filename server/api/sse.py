"""Server-sent events, written to the connection itself where it takes them at once, and else to the ASGI ``send``."""

from __future__ import annotations

import logging
from typing import Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.choices import Delta
from server.api.errors import INTERNAL, error_body
from server.api.exchange import Exchange, News
from server.api.generation import Generation
from server.api.line import Line, line_of
from server.errors import SlimserveError
from server.requests import ClientGone

log = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


MARK = '"\0"'
"""Stands for the text of an event that is to be split at it: no other value of a frame can hold this."""


def split_at_text(frame: msgspec.Struct) -> tuple[bytes, bytes]:
    """What an event is before and after its text, which is ``MARK`` in ``frame``."""
    before, after = event(msgspec.json.encode(frame)).split(msgspec.json.encode(MARK))
    return before, after


class EventFormat(Protocol):
    """The shape of one route's events."""

    def events(self, index: int, delta: Delta) -> bytes:
        """One event for what is new of one choice, or none (empty) where nothing is to be told yet."""

    def usage(self) -> bytes:
        """The chunk with ``usage`` or ``timings`` and no choices, or empty where neither was asked for."""


class EventStream(Response):
    """Tokens that are ready together share an event, one for each choice.

    The status line leaves with the first token or the first keep-alive comment: what is refused before has its own
    status. An error after that is one event with the error object, and the stream ends without ``[DONE]``, which only
    a complete answer has.
    """

    def __init__(self, generation: Generation, format: EventFormat, keep_alive: float) -> None:
        self.background = None
        self._generation = generation
        self._format = format
        self._keep_alive = keep_alive
        self._line: Line | None = None
        self._body = b""
        """What came last and was not written."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._generation.start(receive, self._keep_alive) as exchange:
            news = await exchange.next()
            await exchange.send(send, {"type": "http.response.start", "status": 200, "headers": HEADERS})
            self._line = line_of(scope)
            try:
                tail = await self._write(exchange, news, send)
            except ClientGone:
                raise
            except SlimserveError as error:
                log.warning("request %s: %s", scope.get("request_id"), error.log)
                tail = event(error_body(error))
            except Exception:
                log.exception("request %s failed", scope.get("request_id"))
                tail = event(error_body(INTERNAL))
            await exchange.send(send, {"type": "http.response.body", "body": tail})

    async def _write(self, exchange: Exchange, news: News, send: Send) -> bytes:
        """Write until all choices have ended; returns the last piece, not yet written."""
        generation = self._generation
        self._body = self._encode(news)
        while not generation.finished:
            if self._body:
                await exchange.send(send, {"type": "http.response.body", "body": self._body, "more_body": True})
            await exchange.feed(self._take)
        return self._body + self._format.usage() + DONE

    def _take(self, news: News) -> bool:
        """Write what is new at once; True where ``_write`` has to go on, for it is the end or has to wait."""
        body = self._body = self._encode(news)
        if self._generation.finished:
            return True
        return bool(body) and (self._line is None or not self._line.write(body))

    def _encode(self, news: News) -> bytes:
        if not news:
            return KEEP_ALIVE
        events = self._format.events
        return b"".join([events(index, delta) for index, delta in self._generation.read(news)])
