"""What web pages of other origins may do here: nothing, unless their origin is on the list. Pure ASGI middleware."""

from __future__ import annotations

import ipaddress

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import error_response
from server.api.middleware import header
from server.api.state import ApiState
from server.errors import Forbidden

_QUOTAS = (f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens"))
_READABLE = ", ".join(("x-request-id", "retry-after", *_QUOTAS))
_PREFLIGHT = {
    "access-control-allow-methods": "GET, POST",
    "access-control-allow-headers": (
        "authorization, content-type, traceparent, tracestate, x-request-id, x-request-timeout-ms"
    ),
    "access-control-max-age": "600",
}


class Browsers:
    """Answers preflight requests of the listed origins, lets their pages read answers, and refuses strange host names.

    A server that asks for no key and is for this machine alone can still be reached by a page from elsewhere whose
    name was made to point here (DNS rebinding): the browser takes it for that page's own origin. Such a request carries
    the page's host name, so only addresses, localhost and names without a dot are answered: those of a local network,
    which nobody can register.
    """

    def __init__(self, app: ASGIApp, state: ApiState) -> None:
        self._app = app
        self._state = state
        self._origins = frozenset(state.settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        origin = (header(scope, b"origin") or b"").decode("latin-1")
        listed = origin in self._origins

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("x-content-type-options", "nosniff")
                if self._origins:
                    headers.add_vary_header("origin")
                if listed:
                    headers["access-control-allow-origin"] = origin
                    headers["access-control-expose-headers"] = _READABLE
            await send(message)

        answer: ASGIApp = self._app
        if self._is_foreign(scope):
            answer = error_response(
                Forbidden("Without an API key this server answers to localhost and addresses, not to names with a dot")
            )
        elif listed and scope["method"] == "OPTIONS" and header(scope, b"access-control-request-method") is not None:
            answer = Response(status_code=204, headers=_PREFLIGHT)
        await answer(scope, receive, send_with_headers)

    def _is_foreign(self, scope: Scope) -> bool:
        if not (self._state.settings.this_machine_only and self._state.tenants.open):
            return False
        host = header(scope, b"host")
        return host is not None and not _is_local(host.decode("latin-1"))


def _is_local(host: str) -> bool:
    """``host`` as in the header: a name or an address, the latter of IPv6 in brackets, and perhaps a port."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name.lower().endswith(".localhost") or not (set(".:") & set(name)):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
