"""Who calls, and what they may: API keys, tenants' quotas and the admin routes. Pure ASGI middleware."""

from __future__ import annotations

import ipaddress

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import error_response
from server.api.middleware import OPEN_PATHS, header
from server.api.state import ApiState
from server.errors import Forbidden, RateLimited, Unauthorized
from server.tenants import NOBODY, Tenant
from server.web.page import PATHS as PAGE

ADMIN = "/admin"
OPERATOR = frozenset({"/metrics", "/stats"})
"""They tell of all tenants' traffic."""
_FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")
"""A proxy on this machine speaks for somebody else."""
_BROWSER = (b"origin", b"sec-fetch-site")
"""A web page must not reach the admin routes through its reader's browser."""


class ApiKeys:
    """Finds the tenant of a request's key and leaves it in the scope; refuses what no key opens.

    ``OPEN_PATHS`` and the web page's files need no key. The admin routes need the admin key where one is set, and else
    a client on this machine. The key of a single tenant does not open what tells of all of them.
    """

    def __init__(self, app: ASGIApp, state: ApiState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope["tenant"] = self._admit(scope)
            except (Unauthorized, Forbidden) as refusal:
                return await error_response(refusal)(scope, receive, send)
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> Tenant:
        if scope["path"] in OPEN_PATHS or scope["path"] in PAGE:
            return NOBODY
        tenants = self._state.tenants
        key = _bearer(scope)
        if key is not None and tenants.is_admin(key):
            return NOBODY
        if f"{scope['path']}/".startswith(f"{ADMIN}/"):
            if tenants.has_admin or not _from_here(scope):
                raise Unauthorized("The admin routes need the admin key, or where none is set a client on this machine")
            return NOBODY
        if tenants.open:
            return NOBODY
        tenant = None if key is None else tenants.find(key)
        if tenant is None:
            raise Unauthorized("A valid API key is needed: Authorization: Bearer KEY")
        if tenant is not NOBODY and scope["path"] in OPERATOR:
            raise Forbidden("The key of a tenant does not open this route")
        return tenant


class TenantQuotas:
    """Counts each POST against its tenant's quota before the body is read, and tells what is left."""

    def __init__(self, app: ASGIApp, state: ApiState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        arrived = self._state.clock()
        tenant: Tenant = scope["tenant"]
        quotas = self._state.quotas

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(dict(quotas.headers(tenant.name)))
            await send(message)

        try:
            quotas.enter(tenant)
        except RateLimited as refusal:
            self._state.metrics.refused("", refusal.reason, tenant.name, self._state.clock() - arrived)
            return await error_response(refusal)(scope, receive, send_with_headers)
        try:
            await self._app(scope, receive, send_with_headers if quotas.headers(tenant.name) else send)
        finally:
            quotas.leave(tenant.name)


def caller(request: Request) -> Tenant:
    """Whose request it is, as ``ApiKeys`` found out."""
    tenant: Tenant = request.scope["tenant"]
    return tenant


def _bearer(scope: Scope) -> bytes | None:
    scheme, _, key = (header(scope, b"authorization") or b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else None


def _from_here(scope: Scope) -> bool:
    """A program on this machine, not a proxy and not a web page."""
    if scope["client"] is None or any(header(scope, name) is not None for name in _FORWARDED + _BROWSER):
        return False
    try:
        return ipaddress.ip_address(scope["client"][0]).is_loopback
    except ValueError:
        return False
