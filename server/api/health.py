"""GET /health/live, /health/ready, /version and /metrics"""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.responses import Response

from server.api.body import api_state, json_response
from server.api.replies import Liveness, ModelReadiness, Readiness, Version

_TURN = 0.0003
"""Seconds that a page may take of the event loop at a time, and what one more of its parts takes."""


async def live(request: Request) -> Response:
    """200 while the process and its workers make progress; a supervisor of processes may restart us otherwise."""
    good = api_state(request).ready().live
    return json_response(Liveness("live" if good else "stalled"), 200 if good else 503)


async def ready(request: Request) -> Response:
    """200 only when a request would be served."""
    now = api_state(request).ready()
    models = [
        ModelReadiness(each.name, each.state, each.phase, each.done, each.total, each.reason) for each in now.models
    ]
    return json_response(Readiness("ready" if now.ready else "not ready", models), 200 if now.ready else 503)


async def version(request: Request) -> Response:
    return json_response(Version(api_state(request).version))


async def metrics(request: Request) -> Response:
    """Rendered in turns with what streams need of the event loop. A thread would not spare them: it would hold the
    interpreter for longer at a time."""
    loop = asyncio.get_running_loop()
    parts: list[bytes] = []
    began = loop.time()
    for part in api_state(request).metrics.parts():
        parts.append(part)
        if loop.time() - began > _TURN:
            await asyncio.sleep(0)
            began = loop.time()
    return Response(b"".join(parts), media_type="text/plain; version=0.0.4; charset=utf-8")
