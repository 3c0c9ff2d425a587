"""The listening socket, and uvicorn on it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from server.api.line import Line, with_line
from server.errors import CommandFailed
from server.tls import NO_PASSWORD, Certificate

CLOSE_TIMEOUT = 5
"""Seconds for answered connections to take their last bytes."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises CommandFailed when the address cannot be had."""
    try:
        candidates = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(candidates, key=lambda entry: entry[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            # Listening at once: of two servers that start together the second fails here, before any model work.
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        hint = "; another program uses it, choose another --port" if error.errno == errno.EADDRINUSE else ""
        raise CommandFailed(f"cannot listen on {host} port {port}: {error.strerror}{hint}") from None
    return listener


class HttpConnection(H11Protocol):  # type: ignore[misc]  # mypy does not follow its import
    """uvicorn's own connection, whose streams may write to it through a ``Line``."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._line = Line()
        super().__init__(config, server_state, with_line(app_state, self._line), _loop)

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._line.opened(transport)
        super().connection_made(transport)

    def pause_writing(self) -> None:
        self._line.paused = True
        super().pause_writing()

    def resume_writing(self) -> None:
        self._line.paused = False
        super().resume_writing()


class HttpServer(uvicorn.Server):
    """Leaves the signals to ``Application``: uvicorn would close the port before readiness could say anything."""

    def __init__(self, app: ASGIApp, certificate: Certificate | None) -> None:
        """Plain HTTP where ``certificate`` is None."""
        self._certificate = certificate
        config = uvicorn.Config(
            app,
            http=HttpConnection,
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=65,
            timeout_graceful_shutdown=CLOSE_TIMEOUT,
            ssl_certfile=None if certificate is None else certificate.cert,
            ssl_keyfile=None if certificate is None else certificate.key,
            ssl_keyfile_password=NO_PASSWORD,
        )
        super().__init__(config)

    def renew_certificate(self) -> None:
        """Read the files again, for connections from now on. Raises UsageError, and then nothing has changed."""
        if self._certificate is not None and self.config.ssl is not None:
            self._certificate.check()
            self._certificate.load_into(self.config.ssl)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
