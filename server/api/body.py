"""From the bytes of a request body to a checked model, and back to JSON."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.responses import Response

from server.api.errors import invalid_body
from server.api.schemas import FIELD_NAMES
from server.api.state import ApiState
from server.errors import InvalidRequest

B = TypeVar("B", bound=BaseModel)


async def read_body(request: Request, model: type[B]) -> B:
    """Raises InvalidRequest that says what is wrong and where. The size was bounded by BodyLimit."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise InvalidRequest("Send the body as JSON with the header Content-Type: application/json")
    try:
        data = from_json(await request.body(), allow_inf_nan=False)
    except ValueError as error:
        hint = " (half of a surrogate pair is no character)" if "hex escape" in str(error) else ""
        raise InvalidRequest(f"The body is not valid JSON: {error}{hint}") from None
    if not isinstance(data, dict):
        raise InvalidRequest("The body must be a JSON object.")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise invalid_body(error, FIELD_NAMES) from None


def json_response(body: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def api_state(request: Request) -> ApiState:
    state: ApiState = request.app.state.api
    return state
