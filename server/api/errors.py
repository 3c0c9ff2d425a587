"""Every error leaves as the nested OpenAI object: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import InternalError, InvalidRequest, Overloaded, SlimserveError, Unauthorized
from server.infer.messages import FlatError

log = logging.getLogger(__name__)

INTERNAL = InternalError("The server had an internal error while it answered this request.")
"""What a client reads of a fault of our own; the rest is in the log under the same request id."""

_LONGEST_MESSAGE = 500
_MOST_FINDINGS = 1000
"""Beyond this no one of them is told: a list of half a million would cost the event loop seconds."""


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None
    predicted_ttft_ms: float | msgspec.UnsetType = msgspec.UNSET
    """Of a request that is refused because it would come too late."""
    queue_seconds: float | msgspec.UnsetType = msgspec.UNSET
    """Predicted wait behind others."""


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


def error_body(error: SlimserveError) -> bytes:
    detail = ErrorDetail(error.message, error.type, error.param, error.code)
    if isinstance(error, Overloaded):
        ttft, queue = error.predicted_ttft, error.queue_seconds
        detail = msgspec.structs.replace(
            detail,
            predicted_ttft_ms=msgspec.UNSET if ttft is None else round(ttft * 1000, 1),
            queue_seconds=msgspec.UNSET if queue is None else round(queue, 3),
        )
    return msgspec.json.encode(ErrorBody(detail))


def error_headers(error: SlimserveError) -> dict[str, str]:
    if error.retry_after is not None:
        return {"retry-after": str(max(math.ceil(error.retry_after), 1))}
    if isinstance(error, Unauthorized):
        return {"www-authenticate": "Bearer"}
    return {}


class ErrorResponse(Response):
    """Under /v2 the body is flat, as the clients of that protocol read it."""

    def __init__(self, error: SlimserveError) -> None:
        super().__init__(error_body(error), error.status, error_headers(error), "application/json")
        self._text = error.message

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_flat(scope["path"]):
            self.body = flat_error(self._text)
            self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def is_flat(path: str) -> bool:
    return f"{path}/".startswith("/v2/")


def flat_error(text: str) -> bytes:
    return msgspec.json.encode(FlatError(text))


def error_response(error: SlimserveError) -> Response:
    return ErrorResponse(error)


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(SlimserveError, _answer_own)
    app.add_exception_handler(HTTPException, _answer_routing)


async def _answer_own(request: Request, error: Exception) -> Response:
    assert isinstance(error, SlimserveError)
    if error.status == 500:
        log.error("request %s: %s", request.scope.get("request_id"), error.log)
    return error_response(error)


async def _answer_routing(request: Request, error: Exception) -> Response:
    """The router's own refusals: 404 for an unknown route, 405 for a wrong method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"[:_LONGEST_MESSAGE]
    if error.status_code == 405:
        detail = ErrorDetail(f"Method not allowed: {what}", "invalid_request_error", None, "method_not_allowed")
    else:
        detail = ErrorDetail(f"Unknown route: {what}", "not_found_error", None, "unknown_route")
    body = flat_error(detail.message) if is_flat(request.url.path) else msgspec.json.encode(ErrorBody(detail))
    return Response(body, error.status_code, dict(error.headers or {}), "application/json")


def invalid_body(error: ValidationError, field_names: frozenset[str]) -> InvalidRequest:
    """The most telling of pydantic's findings, with the path of the field in ``param``.

    ``field_names`` tells names of fields from the tags that pydantic puts into the path of a union's member.
    """
    if error.error_count() > _MOST_FINDINGS:
        return InvalidRequest(f"The body is wrong in {error.error_count()} places.")
    details = error.errors(include_url=False, include_input=False)
    first = details[0]["loc"][:1]
    detail = max((each for each in details if each["loc"][:1] == first), key=lambda each: _depth(each, field_names))
    unknown = detail["type"] == "extra_forbidden"
    param = _path(detail["loc"], field_names | {str(detail["loc"][-1])} if unknown else field_names)[:100]
    if unknown:
        return InvalidRequest(f"Unknown or unsupported field: {param}", param=param)
    text = detail["msg"].removeprefix("Value error, ")[:_LONGEST_MESSAGE]
    if param:
        return InvalidRequest(f"{param}: {text}", param=param)
    named = text.partition(" ")[0]
    return InvalidRequest(text, param=named if named in field_names else None)


def _depth(detail: Any, field_names: frozenset[str]) -> int:
    return sum(isinstance(part, int) or part in field_names for part in detail["loc"])


def _path(location: Sequence[int | str], field_names: frozenset[str]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in field_names:
            path += f".{part}" if path else part
    return path
