"""POST /admin/reload. ``callers`` has made sure that it is the operator who asks."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from server.api.body import api_state, json_response


async def reload(request: Request) -> Response:
    """Read the settings again and follow them, without losing a stream; 400 where they are wrong, 409 where busy."""
    change = api_state(request).reload
    assert change is not None, "the route is there only where it can do something"
    return json_response(await change())
