"""POST /v1/embeddings: OpenAI's route, on encoders."""

from __future__ import annotations

import base64

from fastapi import Request as HttpRequest
from starlette.responses import Response

from engines.tensors import Signature, pack, unpack
from server.api.body import api_state, json_response, read_body
from server.api.generation import off_loop
from server.api.inference import batch_request, compute
from server.api.replies import Embedding, EmbeddingList, EmbeddingUsage
from server.api.schemas import EmbeddingBody
from server.api.service import service_of_class
from server.api.state import ApiState, PlainModel
from server.errors import EngineUnavailable, InvalidRequest, ModelNotFound
from server.text.encoder import TextEncoder, Vector, hidden_output


async def embeddings(request: HttpRequest) -> Response:
    """Each text is a row of its own: those of all requests share steps, by length."""
    state = api_state(request)
    arrived = state.clock()
    body = await read_body(request, EmbeddingBody)
    model = _find(state, body.model)
    encoder, signature, output = _of_encoder(model)
    encoded = await off_loop(state, _encode, encoder, body)
    requests = []
    for ids, types in encoded:
        tensors = encoder.tensors(ids, types, signature)
        sizes = dict.fromkeys(signature.free_axes, len(ids))
        inputs = pack(tensors, [output])
        requests.append(batch_request(state, model, arrived, rows=1, bucket=signature.bucket(sizes), inputs=inputs))
    service = service_of_class(state, request, body.priority or "normal")
    outputs = await compute(state, requests, service, request)
    vectors = [encoder.embed(unpack(each)[0][0]) for each in outputs]
    tokens = sum(len(ids) for ids, _ in encoded)
    state.quotas.charge(service.tenant.name, tokens)
    as_text = body.encoding_format == "base64"
    data = [Embedding(index, _written(vector, as_text)) for index, vector in enumerate(vectors)]
    return json_response(EmbeddingList(data, model.name, EmbeddingUsage(tokens, tokens)))


def _encode(encoder: TextEncoder, body: EmbeddingBody) -> list[tuple[list[int], list[int]]]:
    """Raises InvalidRequest for a text that is longer than the model takes and may not be cut."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    found = []
    for index, text in enumerate(texts):
        ids, types = encoder.encode(text)
        if len(ids) > encoder.max_tokens:
            if not body.truncate:
                raise InvalidRequest(
                    f"input[{index}] has {len(ids)} tokens, and the model takes {encoder.max_tokens}; truncate: true "
                    "cuts it",
                    param="input",
                )
            # The last token ends every text.
            ids, types = [*ids[: encoder.max_tokens - 1], ids[-1]], types[: encoder.max_tokens]
        found.append((ids, types))
    return found


def _written(vector: Vector, as_text: bool) -> list[float] | str:
    return base64.b64encode(vector.tobytes()).decode() if as_text else [float(each) for each in vector]


def _find(state: ApiState, name: str) -> PlainModel:
    if name in state.coming:
        raise EngineUnavailable("The server starts: its models are not here yet.", retry_after=5)
    model = state.models.get(name)
    if model is None:
        raise ModelNotFound(f"The model {name[:80]!r} is not served here.", param="model")
    if not isinstance(model, PlainModel) or model.encoder is None:
        raise InvalidRequest(
            f"The model {name!r} is no text encoder with a tokenizer.json, so it has no embeddings", param="model"
        )
    return model


def _of_encoder(model: PlainModel) -> tuple[TextEncoder, Signature, str]:
    if model.signature is None:
        raise EngineUnavailable(f"The model {model.name} is not loaded yet.", retry_after=1)
    output = hidden_output(model.signature)
    if output is None or model.encoder is None:
        raise InvalidRequest(f"The graph of {model.name!r} does not give a vector for each token", param="model")
    return model.encoder, model.signature, output
