"""What a request asks for besides its answer: how soon, how urgently, for whom, and how long its client waits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastapi import Request as HttpRequest

from server.api.callers import caller
from server.api.schemas import GenerationBody
from server.api.state import ApiState
from server.errors import Forbidden, InvalidRequest
from server.request_record import RequestRecord
from server.requests import Request, Targets
from server.tenants import Tenant

if TYPE_CHECKING:
    from server.worker.wire import Priority

LONGEST_TIMEOUT = 24 * 3600.0
_SHORTEST = 0.001
"""Of either unit: what is shorter is a mistake, and its rounding could be 0."""
TIMEOUT_HEADER = "x-request-timeout-ms"
SDK_TIMEOUT_HEADER = "x-stainless-read-timeout"
"""Seconds; OpenAI's own client sends it with each request."""


@dataclass(frozen=True, slots=True)
class Service:
    """The same for all prompts of one HTTP request."""

    tenant: Tenant
    priority: Priority
    targets: Targets
    timeout: float | None
    http_id: str = ""
    record: RequestRecord | None = None
    """To be filled in, where somebody wants to know."""

    def apply(self, request: Request) -> Request:
        """The request with this service. The tenant becomes part of the salt, so prefix caches are kept apart."""
        tenant, salt = self.tenant.name, request.cache_salt
        return replace(
            request,
            cache_salt=f"{tenant}/{salt}" if tenant or salt else "",
            tenant=tenant,
            weight=self.tenant.weight,
            priority=self.priority,
            ttft=self.targets.ttft,
            tpot=self.targets.tpot,
            firm=self.targets.ttft is not None or self.targets.tpot is not None,
            timeout=self.timeout,
            http_id=self.http_id,
        )


def read_service(state: ApiState, http_request: HttpRequest, body: GenerationBody) -> Service:
    """Targets of the request win over those of its class. Raises InvalidRequest and Forbidden."""
    service = service_of_class(state, http_request, body.priority or "normal")
    if body.slo is None:
        return service
    targets, asked = service.targets, body.slo
    targets = Targets(
        targets.ttft if asked.ttft_ms is None else asked.ttft_ms / 1000,
        targets.tpot if asked.tpot_ms is None else asked.tpot_ms / 1000,
    )
    return replace(service, targets=targets)


def service_of_class(state: ApiState, http_request: HttpRequest, priority: Priority) -> Service:
    """What the class of a request says of it. Raises InvalidRequest and Forbidden."""
    tenant = caller(http_request)
    if not tenant.may_ask_for(priority):
        raise Forbidden(f"priority: this key may ask for {tenant.max_priority} at most", param="priority")
    targets = state.targets.get(priority, Targets())
    scope = http_request.scope
    timeout = _timeout(http_request.headers)
    return Service(tenant, priority, targets, timeout, scope.get("request_id", ""), scope.get("record"))


def _timeout(headers: Mapping[str, str]) -> float | None:
    """Our own header is checked; what a library adds by itself is only used where it makes sense."""
    asked = headers.get(TIMEOUT_HEADER)
    if asked is not None:
        milliseconds = _positive(asked)
        if milliseconds is None or milliseconds > LONGEST_TIMEOUT * 1000:
            raise InvalidRequest(f"{TIMEOUT_HEADER}: a number of milliseconds, at most a day")
        return milliseconds / 1000
    seconds = _positive(headers.get(SDK_TIMEOUT_HEADER, ""))
    return seconds if seconds is not None and seconds <= LONGEST_TIMEOUT else None


def _positive(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= _SHORTEST else None
