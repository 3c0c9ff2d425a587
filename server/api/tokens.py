"""POST /tokenize and /detokenize"""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from server.api.body import api_state, json_response, read_body
from server.api.chat import render_prompt
from server.api.generation import check_token_ids, find_model, off_loop
from server.api.replies import Detokenized, Tokenized
from server.api.schemas import DetokenizeBody, TokenizeBody
from server.api.state import ServedModel


async def tokenize(request: Request) -> Response:
    state = api_state(request)
    body = await read_body(request, TokenizeBody)
    model = find_model(state, body.model)
    tokens = await off_loop(state, _encode, body, model)
    names = [model.text.token_text(token) for token in tokens] if body.return_token_strs else None
    return json_response(Tokenized(len(tokens), model.max_model_len, tokens, names))


async def detokenize(request: Request) -> Response:
    state = api_state(request)
    body = await read_body(request, DetokenizeBody)
    model = find_model(state, body.model)
    check_token_ids(body.tokens, model, "tokens")
    return json_response(Detokenized(await off_loop(state, model.text.decode, body.tokens)))


def _encode(body: TokenizeBody, model: ServedModel) -> list[int]:
    if body.messages is None:
        return model.text.encode(body.prompt or "", body.add_special_tokens is not False)
    opened = body.add_generation_prompt is not False
    tokens, _ = render_prompt(model, body.messages, opened, body.chat_template_kwargs or {})
    return tokens
