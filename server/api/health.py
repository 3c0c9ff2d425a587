"""GET /health/live, /health/ready, /version and /metrics"""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from server.api.body import api_state, json_response
from server.api.replies import Liveness, ModelReadiness, Readiness, Version


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
    return Response(api_state(request).metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
