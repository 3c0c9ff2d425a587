"""/v2: the Open Inference Protocol (KServe v2) for plain models."""

from __future__ import annotations

from dataclasses import replace

from fastapi import Request as HttpRequest
from starlette.responses import Response

from engines.tensors import Signature
from server.api.body import api_state, json_response
from server.api.inference import batch_request, compute
from server.api.service import service_of_class
from server.api.state import PlainModel
from server.errors import EngineUnavailable, InvalidRequest, ModelNotFound
from server.infer.answer import write_answer
from server.infer.messages import ModelMetadata, ModelReady, ServerLive, ServerMetadata, ServerReady, TensorMetadata
from server.infer.request import read_infer

EXTENSIONS = ["binary_tensor_data"]
PLATFORM = "onnxruntime_onnx"
JSON_LENGTH = "inference-header-content-length"


async def server_metadata(request: HttpRequest) -> Response:
    return json_response(ServerMetadata("slimserve", api_state(request).version, EXTENSIONS))


async def server_live(request: HttpRequest) -> Response:
    live = api_state(request).ready().live
    return json_response(ServerLive(live), 200 if live else 503)


async def server_ready(request: HttpRequest) -> Response:
    ready = api_state(request).ready().ready
    return json_response(ServerReady(ready), 200 if ready else 503)


async def model_metadata(request: HttpRequest) -> Response:
    model = _find(request)
    signature = _signature(model)
    batch = [-1] if signature.batched else []
    first = len(batch)
    return json_response(
        ModelMetadata(
            model.name,
            [model.version],
            PLATFORM,
            [TensorMetadata(each.name, each.datatype, [*batch, *each.shape[first:]]) for each in signature.inputs],
            [TensorMetadata(each.name, each.datatype, [*batch, *each.shape[first:]]) for each in signature.outputs],
        )
    )


async def model_ready(request: HttpRequest) -> Response:
    state, name = api_state(request), request.path_params["model_name"]
    if name not in state.coming:
        _find(request)
    ready = any(each.name == name and each.state == "ready" for each in state.ready().models)
    return json_response(ModelReady(name, ready), 200 if ready else 503)


async def infer(request: HttpRequest) -> Response:
    """One batch, in JSON or binary, and its outputs as the request wants them."""
    state = api_state(request)
    arrived = state.clock()
    model = _find(request)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise InvalidRequest("Send the body as it is: content-encoding is not supported")
    asked = read_infer(await request.body(), request.headers.get(JSON_LENGTH), _signature(model))
    service = service_of_class(state, request, "normal")
    if asked.timeout is not None:
        service = replace(service, timeout=asked.timeout)
    batch = batch_request(state, model, arrived, rows=asked.rows, bucket=asked.bucket, inputs=asked.inputs)
    (output,) = await compute(state, [batch], service, request)
    answer = write_answer(model.name, model.version, asked.id, asked.outputs, output)
    if answer.json_length is None:
        return Response(answer.content, media_type="application/json")
    headers = {"Inference-Header-Content-Length": str(answer.json_length)}
    return Response(answer.content, headers=headers, media_type="application/octet-stream")


def _find(request: HttpRequest) -> PlainModel:
    """Raises ModelNotFound, EngineUnavailable at the start, and InvalidRequest for a language model."""
    state = api_state(request)
    name, version = request.path_params["model_name"], request.path_params.get("version")
    if name in state.coming:
        raise EngineUnavailable("The server starts: its models are not here yet.", retry_after=5)
    model = state.models.get(name)
    if model is None:
        raise ModelNotFound(f"The model {name[:80]!r} is not served here.", param="model")
    if not isinstance(model, PlainModel):
        raise InvalidRequest(f"The model {name!r} generates text: it is at /v1/chat/completions", param="model")
    if version is not None and version != model.version:
        raise ModelNotFound(f"The model {name!r} has no version {version[:20]!r}, but {model.version}", param="version")
    return model


def _signature(model: PlainModel) -> Signature:
    if model.signature is None:
        raise EngineUnavailable(f"The model {model.name} is not loaded yet.", retry_after=1)
    return model.signature
