"""GET /v1/models and /v1/models/{model_id}"""

from __future__ import annotations

import msgspec
from fastapi import Request
from starlette.responses import Response

from server.api.body import api_state, json_response
from server.api.generation import find_model
from server.api.replies import ModelCard, ModelList
from server.api.state import ServedModel


async def list_models(request: Request) -> Response:
    return json_response(ModelList([_card(model) for model in api_state(request).language_models.values()]))


async def get_model(request: Request, model_id: str) -> Response:
    return json_response(_card(find_model(api_state(request), model_id)))


def _card(model: ServedModel) -> ModelCard:
    quality = msgspec.UNSET if model.quality is None else model.quality
    return ModelCard(model.name, model.created, model.max_model_len, quality=quality)
