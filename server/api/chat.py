"""POST /v1/chat/completions"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import Request as HttpRequest
from starlette.responses import Response

from server.api.body import api_state, json_response, read_body
from server.api.choices import Delta, LoggedToken, TextOptions
from server.api.generation import Generation, find_model, off_loop, output_limit, run_to_end, sampling_params
from server.api.replies import (
    LOWEST_LOGPROB,
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    FinishReason,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from server.api.schemas import ChatBody, Message
from server.api.service import read_service
from server.api.sse import MARK, EventStream, event, split_at_text
from server.api.state import ServedModel
from server.errors import InvalidRequest
from server.requests import Request


async def chat_completions(http_request: HttpRequest) -> Response:
    state = api_state(http_request)
    arrived = state.clock()
    body = await read_body(http_request, ChatBody)
    service = read_service(state, http_request, body)
    model = find_model(state, body.model)
    kwargs = body.chat_template_kwargs or {}
    opened = body.add_generation_prompt is not False
    prompt, thinking = await off_loop(state, render_prompt, model, body.messages, opened, kwargs)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    request = Request(
        id=state.next_request_id(),
        model=model.name,
        prompt=prompt,
        max_tokens=output_limit(model, len(prompt), asked, None, body.min_tokens),
        sampling=sampling_params(body, model, (body.top_logprobs or 0) if body.logprobs else None),
        arrived=arrived,
        cache_salt=body.cache_salt or "",
    )
    options = TextOptions(body.stops, thinking if model.text.reasoning else None, body.skip_special_tokens is not False)
    generation = Generation(state, model, [request], options, service)
    completion_id = f"chatcmpl-{secrets.token_hex(12)}"
    if body.stream:
        return EventStream(generation, ChatEvents(generation, completion_id, body), state.settings.keep_alive)
    whole = await run_to_end(generation, http_request.receive)
    choices = [_choice(index, delta, generation) for index, delta in enumerate(whole)]
    return json_response(
        ChatCompletion(
            completion_id,
            "chat.completion",
            generation.created,
            model.name,
            generation.fingerprint,
            choices,
            generation.usage,
        )
    )


def render_prompt(
    model: ServedModel, messages: Sequence[Message], add_generation_prompt: bool, kwargs: dict[str, Any]
) -> tuple[list[int], bool]:
    """Token ids of the rendered chat, and whether it ends inside an opened thought. Blocks. Raises InvalidRequest."""
    text = model.text
    if not text.has_chat_template:
        raise InvalidRequest("This model has no chat template; use /v1/completions.", param="messages")
    turns = [_turn(message) for message in messages]
    rendered = text.render_chat(turns, add_generation_prompt=add_generation_prompt, **kwargs)
    return text.encode(rendered, False, max_tokens=model.max_model_len), text.opens_thinking(rendered)


def _turn(message: Message) -> dict[str, Any]:
    """A message as templates know it. Developer is the newer name of the system role."""
    parts = message.content
    content = parts if isinstance(parts, str) else "\n".join(part.text for part in parts or ())
    turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    if reasoning := message.reasoning_content or message.reasoning:
        turn["reasoning_content"] = reasoning
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            turn[name] = value
    return turn


def _choice(index: int, delta: Delta, generation: Generation) -> ChatChoice:
    message = AssistantMessage("assistant", delta.content)
    if generation.model.text.reasoning:
        message = AssistantMessage("assistant", delta.content, delta.reasoning or None, delta.reasoning or None)
    assert delta.finish
    return ChatChoice(index, message, _logprobs(delta, generation), delta.finish)


def _logprobs(delta: Delta, generation: Generation) -> ChatLogprobs | None:
    if generation.requests[0].sampling[0].logprobs is None:
        return None
    return ChatLogprobs([_logged(token, generation.model) for token in delta.logprobs])


def _logged(token: LoggedToken, model: ServedModel) -> TokenLogprob:
    text, entry = model.text, token.entry

    def named(token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(text.token_text(token_id), max(logprob, LOWEST_LOGPROB), list(text.token_bytes(token_id)))

    drawn = named(token.id, entry.logprob)
    best = [named(*pair) for pair in zip(entry.top_ids, entry.top_logprobs, strict=True)]
    return TokenLogprob(drawn.token, drawn.logprob, drawn.bytes, best)


class ChatEvents:
    """Chunks of a streamed chat. The common chunk, text and nothing else, is put together from encoded halves."""

    def __init__(self, generation: Generation, completion_id: str, body: ChatBody) -> None:
        self._generation = generation
        self._id = completion_id
        self._with_usage = body.with_usage
        self._with_timings = body.with_timings
        self._halves: dict[int, tuple[bytes, bytes]] = {}

    def events(self, index: int, delta: Delta) -> bytes:
        role = b"" if index in self._halves else self._open(index)
        if delta.finish or delta.reasoning or delta.logprobs:
            return role + self._full_events(index, delta)
        if delta.content:
            before, after = self._halves[index]
            return b"".join((role, before, msgspec.json.encode(delta.content), after))
        return role

    def usage(self) -> bytes:
        if not (self._with_usage or self._with_timings):
            return b""
        timings = self._generation.timings if self._with_timings else msgspec.UNSET
        frame = self._frame([], self._generation.usage)
        return event(msgspec.json.encode(msgspec.structs.replace(frame, timings=timings)))

    def _open(self, index: int) -> bytes:
        """The first chunk of a choice tells the role."""
        self._halves[index] = split_at_text(self._frame([ChatChunkChoice(index, ChatDelta(content=MARK), None, None)]))
        return self._chunk(index, ChatDelta(role="assistant", content=""))

    def _full_events(self, index: int, delta: Delta) -> bytes:
        chunks = b""
        if delta.content or delta.reasoning or delta.logprobs:
            reasoning = delta.reasoning or None
            news = ChatDelta(content=delta.content or None, reasoning_content=reasoning, reasoning=reasoning)
            chunks = self._chunk(index, news, _logprobs(delta, self._generation))
        if delta.finish:
            chunks += self._chunk(index, ChatDelta(), finish=delta.finish)
        return chunks

    def _chunk(
        self, index: int, news: ChatDelta, logprobs: ChatLogprobs | None = None, finish: FinishReason | None = None
    ) -> bytes:
        return event(msgspec.json.encode(self._frame([ChatChunkChoice(index, news, logprobs, finish)])))

    def _frame(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        generation = self._generation
        return ChatChunk(
            self._id,
            "chat.completion.chunk",
            generation.created,
            generation.model.name,
            generation.fingerprint,
            choices,
            usage if self._with_usage else msgspec.UNSET,
        )
