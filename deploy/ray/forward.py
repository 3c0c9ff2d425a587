"""One request from Ray's proxy to the server of this replica, and its answer back as it comes."""

from __future__ import annotations

import httpx
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.errors import error_response
from server.errors import EngineUnavailable, ModelNotFound, SlimserveError

_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "te", "trailer", "transfer-encoding", "upgrade", "host"}
)
"""Headers that are about one connection, not about the request or the answer."""
_PRIVATE = ("/admin",)
"""A request reaches one replica of many: what changes a server has no sense here."""


class Forwarded(Response):
    """An answer that is sent on while it comes. When the client leaves, so does the request to the server."""

    def __init__(self, answer: httpx.Response, replica: str) -> None:
        self._answer = answer
        super().__init__(status_code=answer.status_code)
        self.raw_headers = [(k.lower(), v) for k, v in answer.headers.raw if k.lower().decode("latin-1") not in _HOP]
        self.raw_headers.append((b"x-served-by", replica.encode()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for chunk in self._answer.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._answer.aclose()


async def forward(request: Request, http: httpx.AsyncClient, replica: str) -> Response:
    """Ask the server behind ``http``; errors have the form that the server's own have."""
    path = request.url.path
    if f"{path}/".startswith(tuple(f"{prefix}/" for prefix in _PRIVATE)):
        return refusal(ModelNotFound("Change the Serve application instead: a request reaches one of its replicas."))
    headers = [(k, v) for k, v in request.headers.raw if k.decode("latin-1") not in _HOP]
    # The server must not take the request for one from its own machine.
    headers.append((b"x-forwarded-for", (request.client.host if request.client else "unknown").encode()))
    url = path + (f"?{request.url.query}" if request.url.query else "")
    question = http.build_request(request.method, url, headers=headers, content=await request.body())
    try:
        return Forwarded(await http.send(question, stream=True), replica)
    except httpx.TransportError:
        return refusal(EngineUnavailable("The replica's server does not answer.", retry_after=1))


def refusal(error: SlimserveError) -> Response:
    """What a client is told of an error on this side."""
    return error_response(error)
