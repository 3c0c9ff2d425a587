"""The HTTP application: routes, error handlers, middleware and the OpenAPI description."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.api.admin import reload
from server.api.browsers import Browsers
from server.api.callers import ApiKeys, TenantQuotas
from server.api.chat import chat_completions
from server.api.completions import completions
from server.api.embeddings import embeddings
from server.api.errors import ErrorBody, add_error_handlers
from server.api.health import live, metrics, ready, version
from server.api.kserve import infer, model_metadata, model_ready, server_live, server_metadata, server_ready
from server.api.middleware import BodyLimit, ConnectionLimit, RequestIds
from server.api.models import get_model, list_models
from server.api.replies import (
    ChatChunk,
    ChatCompletion,
    Detokenized,
    EmbeddingList,
    Liveness,
    ModelCard,
    ModelList,
    Readiness,
    ReloadOutcome,
    TextCompletion,
    Tokenized,
    Version,
)
from server.api.schemas import REQUEST_BODIES, ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, TokenizeBody
from server.api.state import ApiState
from server.api.stats import Stats, stats
from server.api.tokens import detokenize, tokenize
from server.infer.messages import (
    FlatError,
    InferAnswer,
    InferBody,
    ModelMetadata,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
)
from server.web.page import page_routes

_COMPONENTS = "#/components/schemas/"
_ANSWERS = (
    ChatCompletion,
    ChatChunk,
    TextCompletion,
    ModelCard,
    ModelList,
    Tokenized,
    Detokenized,
    EmbeddingList,
    Version,
    Liveness,
    Readiness,
    ReloadOutcome,
    Stats,
    ErrorBody,
    FlatError,
    InferBody,
    InferAnswer,
    ModelMetadata,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
)
_ERRORS = {
    400: "The request is wrong; param names the field",
    401: "No valid API key",
    403: "The key does not open this",
    404: "No such model or route",
    408: "The body did not arrive in time",
    409: "A reload or a load goes on",
    413: "The body is too large",
    429: "The quota of the tenant is used up; see Retry-After and x-ratelimit-*",
    500: "A fault of the server; nothing more is told",
    503: "Overloaded, or the model is not ready; see Retry-After",
    504: "The client's own timeout ran out before the first token",
}


def create_api(state: ApiState) -> FastAPI:
    """The ASGI application over ``state``. Closed to other origins, but for those that its settings list."""
    app = _bare(state, "/openapi.json" if state.settings.openapi else None)
    _post(app, "/v1/chat/completions", chat_completions, ChatBody, ChatCompletion, ChatChunk)
    _post(app, "/v1/completions", completions, CompletionBody, TextCompletion, TextCompletion)
    _post(app, "/v1/embeddings", embeddings, EmbeddingBody, EmbeddingList)
    _post(app, "/tokenize", tokenize, TokenizeBody, Tokenized)
    _post(app, "/detokenize", detokenize, DetokenizeBody, Detokenized)
    _get(app, "/v1/models", list_models, ModelList, 503)
    _get(app, "/v1/models/{model_id:path}", get_model, ModelCard, 404, 503)
    _get(app, "/health/live", live, Liveness)
    _get(app, "/health/ready", ready, Readiness)
    _get(app, "/version", version, Version, 503)
    _get(app, "/stats", stats, Stats, 403, 503)
    _add_infer_routes(app)
    app.router.routes.extend(page_routes())
    if state.settings.metrics:
        _metrics(app)
    if state.reload is not None:
        content = {"application/json": {"schema": _reference(ReloadOutcome)}}
        answers = _errors(400, 401, 409, 503) | {200: {"content": content}}
        app.add_api_route("/admin/reload", reload, methods=["POST"], responses=answers)
    _add_middleware(app, state)
    app.openapi = _describe(app, state)  # type: ignore[method-assign]
    return app


def create_metrics_api(state: ApiState) -> FastAPI:
    """/metrics alone, for a port of its own. The same keys open it."""
    app = _bare(state, None)
    _metrics(app)
    _add_middleware(app, state)
    return app


def _bare(state: ApiState, openapi_url: str | None) -> FastAPI:
    app = FastAPI(
        title="Slimserve",
        version=state.version,
        openapi_url=openapi_url,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.api = state
    add_error_handlers(app)
    return app


def _metrics(app: FastAPI) -> None:
    app.add_api_route("/metrics", metrics, responses=_errors(401, 403, 503) | {200: {"content": {"text/plain": {}}}})


def _add_middleware(app: FastAPI, state: ApiState) -> None:
    settings = state.settings
    app.add_middleware(BodyLimit, limit=settings.max_body, timeout=settings.body_timeout)
    app.add_middleware(ConnectionLimit, limit=settings.max_connections)
    app.add_middleware(TenantQuotas, state=state)
    app.add_middleware(ApiKeys, state=state)
    app.add_middleware(Browsers, state=state)
    app.add_middleware(RequestIds, observer=state.observer)


def _post(
    app: FastAPI,
    path: str,
    handler: Callable[..., Any],
    body: type[BaseModel] | type[msgspec.Struct],
    answer: type[msgspec.Struct],
    chunk: type[msgspec.Struct] | None = None,
) -> None:
    content = {"application/json": {"schema": _reference(answer)}}
    if chunk is not None:
        events = f"Events whose data is a {chunk.__name__}, and at the end [DONE]"
        content["text/event-stream"] = {"schema": {"description": events}}
    if path.startswith("/v2"):
        tensors = "The same JSON, and behind it the tensors that it names"
        content["application/octet-stream"] = {"schema": {"description": tensors}}
    app.add_api_route(
        path,
        handler,
        methods=["POST"],
        responses=_errors(*_ERRORS, path=path) | {200: {"content": content}},
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": _reference(body)}}}
        },
    )


def _get(app: FastAPI, path: str, handler: Callable[..., Any], answer: type[msgspec.Struct], *statuses: int) -> None:
    content = {"application/json": {"schema": _reference(answer)}}
    responses: dict[int | str, dict[str, Any]] = {200: {"content": content}}
    if not path.startswith(("/health", "/v2/health")):
        responses |= _errors(401, *statuses, path=path)
    if path.endswith(("/live", "/ready")):
        responses[503] = {"content": content, "description": "The same, where the answer is no"}
    app.add_api_route(path, handler, responses=responses)


def _add_infer_routes(app: FastAPI) -> None:
    """The Open Inference Protocol. Names of models in it have no slash."""
    _get(app, "/v2", server_metadata, ServerMetadata)
    _get(app, "/v2/health/live", server_live, ServerLive)
    _get(app, "/v2/health/ready", server_ready, ServerReady)
    for path in ("/v2/models/{model_name}", "/v2/models/{model_name}/versions/{version}"):
        _get(app, path, model_metadata, ModelMetadata, 400, 404, 503)
        _get(app, f"{path}/ready", model_ready, ModelReady, 400, 404)
        _post(app, f"{path}/infer", infer, InferBody, InferAnswer)


def _errors(*statuses: int, path: str = "") -> dict[int | str, dict[str, Any]]:
    """Under /v2 they are flat."""
    content = {"application/json": {"schema": _reference(FlatError if path.startswith("/v2") else ErrorBody)}}
    return {status: {"description": _ERRORS[status], "content": content} for status in statuses}


def _reference(model: type) -> dict[str, str]:
    return {"$ref": f"{_COMPONENTS}{model.__name__}"}


def _describe(app: FastAPI, state: ApiState) -> Callable[[], dict[str, Any]]:
    """The OpenAPI document, built again only where a reload has changed the names of the served models."""
    described: list[str] = []

    def openapi() -> dict[str, Any]:
        models = sorted(state.language_models)
        if app.openapi_schema is None or models != described:
            app.openapi_schema = _document(app, models)
            described[:] = models
        return app.openapi_schema

    return openapi


def _document(app: FastAPI, models: Sequence[str]) -> dict[str, Any]:
    """FastAPI's own document, with the structs and the names of the models in it."""
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    targets: list[tuple[type[BaseModel], Literal["validation"]]] = [
        (body, "validation") for body in (*REQUEST_BODIES, EmbeddingBody)
    ]
    bodies = models_json_schema(targets, ref_template=_COMPONENTS + "{model}")[1]["$defs"]
    for body in REQUEST_BODIES:
        bodies[body.__name__]["properties"]["model"]["enum"] = _model_values(body, models)
    answers = msgspec.json.schema_components(_ANSWERS, ref_template=_COMPONENTS + "{name}")[1]
    for operation in (each for path in schema["paths"].values() for each in path.values()):
        operation["responses"].pop("422", None)  # FastAPI adds it; ours are 400
    return schema | {"components": {"schemas": bodies | answers}}


def _model_values(body: type[BaseModel], models: Sequence[str]) -> list[str | None]:
    return [*models] if body.model_fields["model"].is_required() else [*models, None]
