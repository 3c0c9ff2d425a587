"""Server-sent events, written straight to the ASGI ``send``."""

from __future__ import annotations

import logging
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.choices import Delta
from server.api.errors import INTERNAL, error_body
from server.api.exchange import Exchange
from server.api.generation import Generation
from server.errors import SlimserveError
from server.requests import ChoiceNews, ClientGone

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


class EventFormat(Protocol):
    """The shape of one route's events."""

    def events(self, index: int, delta: Delta) -> bytes:
        """One event for what is new of one choice, or none (empty) where nothing is to be told yet."""

    def usage(self) -> bytes:
        """The chunk with ``usage`` and no choices, or empty where it was not asked for."""


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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._generation.start(receive, self._keep_alive) as exchange:
            news = await exchange.next()
            await exchange.send(send, {"type": "http.response.start", "status": 200, "headers": HEADERS})
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

    async def _write(self, exchange: Exchange, news: list[tuple[int, ChoiceNews]], send: Send) -> bytes:
        """Write until all choices have ended; returns the last piece, not yet written."""
        generation = self._generation
        events = self._format.events
        while True:
            body = b"".join([events(index, delta) for index, delta in generation.read(news)]) if news else KEEP_ALIVE
            if generation.finished:
                return body + self._format.usage() + DONE
            if body:
                await exchange.send(send, {"type": "http.response.body", "body": body, "more_body": True})
            news = await exchange.next()
