"""The listening socket, and uvicorn on it."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

import uvicorn

from server.errors import CommandFailed


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


class HttpServer(uvicorn.Server):
    """Leaves the signals to ``Application``: uvicorn would close the port before readiness could say anything."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
