"""Pure ASGI middleware, from the outside in: RequestIds, Browsers, those of ``callers``, ConnectionLimit, BodyLimit."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import INTERNAL, error_response
from server.errors import BodyTooLarge, Overloaded, RequestTimeout, SlimserveError
from server.logs import REQUEST_ID
from server.observer import Observer
from server.request_record import RequestRecord
from server.requests import ClientGone

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"})
"""Answered without a key and beyond the connection limit: a probe must not fail because the server is busy."""

_CLIENT_ID = re.compile(rb"[\w.:-]{1,100}")
_DISCARD_FACTOR = 32
"""A body up to this many times the limit is read and thrown away, so that its sender gets to read the answer."""


class RequestIds:
    """Gives each response an ``X-Request-ID`` (the client's own where it is sane) and turns a fault into a bare 500."""

    def __init__(self, app: ASGIApp, observer: Observer | None = None) -> None:
        """``observer`` is told of each request's beginning and end."""
        self._app = app
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = header(scope, b"x-request-id")
        request_id = given.decode() if given and _CLIENT_ID.fullmatch(given) else secrets.token_hex(12)
        scope["request_id"] = request_id
        REQUEST_ID.set(request_id)
        observer, record = self._observer, self._begin(scope)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if observer is not None and record is not None:
                    observer.answered(record, message["status"])
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            log.debug("request %s: the client left", request_id)
        except Exception:
            log.exception("request %s failed", request_id)
            if not started:
                await error_response(INTERNAL)(scope, receive, send_with_id)
        finally:
            if observer is not None and record is not None:
                record.route = getattr(scope.get("route"), "path", "")
                observer.end(record)

    def _begin(self, scope: Scope) -> RequestRecord | None:
        if self._observer is None:
            return None
        parent = {name: header(scope, name.encode()) for name in ("traceparent", "tracestate")}
        path = scope.get("raw_path") or scope["path"].encode()
        record = scope["record"] = self._observer.begin(scope["request_id"], scope["method"], path, parent)
        return record


class ConnectionLimit:
    """At most ``limit`` requests inside at once."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        if self._inside >= self._limit:
            refusal = Overloaded("Too many requests are open. Try again later.", retry_after=1.0)
            return await error_response(refusal)(scope, receive, send)
        self._inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1


class BodyLimit:
    """Reads the whole body, at most ``limit`` bytes within ``timeout`` seconds, before the application is called."""

    def __init__(self, app: ASGIApp, limit: int, timeout: float) -> None:
        self._app = app
        self._limit = limit
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            async with asyncio.timeout(self._timeout):
                body = await self._read(scope, receive)
        except TimeoutError:
            return await self._refuse(RequestTimeout("The request body did not arrive in time."), scope, receive, send)
        except BodyTooLarge as error:
            return await self._refuse(error, scope, receive, send)
        given = False

        async def receive_body() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_body, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        announced = header(scope, b"content-length")
        length = int(announced) if announced and announced.isdigit() else 0
        patient = header(scope, b"expect") is not None
        discardable = self._limit * (1 if patient else _DISCARD_FACTOR)
        chunks: list[bytes] = []
        size = 0
        while length <= discardable and size <= discardable:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            size += len(message.get("body", b""))
            if size <= self._limit:
                chunks.append(message.get("body", b""))
            else:
                chunks.clear()
            if not message.get("more_body", False):
                break
        if max(size, length) > self._limit:
            raise BodyTooLarge(f"The request body is larger than {self._limit} bytes.")
        return b"".join(chunks)

    async def _refuse(self, error: SlimserveError, scope: Scope, receive: Receive, send: Send) -> None:
        response = error_response(error)
        response.headers["connection"] = "close"
        await response(scope, receive, send)


def header(scope: Scope, name: bytes) -> bytes | None:
    """First value of a header; ``name`` in lower case."""
    return next((value for key, value in scope["headers"] if key == name), None)
