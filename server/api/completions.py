"""POST /v1/completions"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import msgspec
from fastapi import Request as HttpRequest
from starlette.responses import Response

from engines.protocol import TokenLogprobs
from server.api.body import api_state, json_response, read_body
from server.api.choices import Delta, TextOptions
from server.api.generation import (
    Generation,
    check_token_ids,
    find_model,
    off_loop,
    output_limit,
    run_to_end,
    sampling_params,
)
from server.api.replies import LOWEST_LOGPROB, FinishReason, TextChoice, TextCompletion, TextLogprobs, Usage
from server.api.schemas import MAX_CHOICES, MAX_PROMPTS, CompletionBody
from server.api.service import read_service
from server.api.sse import MARK, EventStream, event, split_at_text
from server.api.state import ApiState, ServedModel
from server.errors import InvalidRequest
from server.requests import Request
from server.text import ModelText

DEFAULT_MAX_TOKENS = 16
QUICK_IDS = 8192
"""Most ids of a prompt that are checked on the event loop: some tens of microseconds."""


@dataclass(frozen=True, slots=True)
class Prompt:
    ids: list[int]
    text: str = ""
    """Only where it is echoed, like ``offsets``."""
    offsets: tuple[int, ...] = ()
    """Where each token's text begins in ``text``, in characters."""


async def completions(http_request: HttpRequest) -> Response:
    state = api_state(http_request)
    arrived = state.clock()
    body = await read_body(http_request, CompletionBody)
    service = read_service(state, http_request, body)
    model = find_model(state, body.model)
    prompts = read_prompts(body, model) if _is_quick(body) else await off_loop(state, read_prompts, body, model)
    options = TextOptions(body.stops, skip_special_tokens=body.skip_special_tokens is not False)
    generation = Generation(state, model, _requests(state, body, model, prompts, arrived), options, service)
    shape = CompletionShape(generation, prompts, body)
    if body.stream:
        return EventStream(generation, shape, state.settings.keep_alive)
    whole = await run_to_end(generation, http_request.receive)
    choices = [shape.choice(index, delta) for index, delta in enumerate(whole)]
    return json_response(shape.frame(choices, generation.usage))


def read_prompts(body: CompletionBody, model: ServedModel) -> list[Prompt]:
    """Tokenize, or check the ids that were given. Blocks. Raises InvalidRequest."""
    inputs = _as_list(body.prompt)
    if len(inputs) * body.choices > max(MAX_PROMPTS, MAX_CHOICES):
        raise InvalidRequest(f"At most {max(MAX_PROMPTS, MAX_CHOICES)} choices over all prompts", param="n")
    return [_read_prompt(each, body, model) for each in inputs]


def _is_quick(body: CompletionBody) -> bool:
    """A few ids are checked in less time than it takes to hand them to a thread."""
    prompt = body.prompt
    return isinstance(prompt, list) and isinstance(prompt[0], int) and len(prompt) <= QUICK_IDS and not body.echo


def _as_list(prompt: str | list[int] | list[str] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return cast(Sequence[str | list[int]], prompt)


def _read_prompt(given: str | list[int], body: CompletionBody, model: ServedModel) -> Prompt:
    if isinstance(given, str):
        ids = model.text.encode(given, body.add_special_tokens is not False, max_tokens=model.max_model_len)
    else:
        ids = given
        check_token_ids(ids, model, "prompt")
    if not body.echo:
        return Prompt(ids)
    text = given if isinstance(given, str) else model.text.decode(ids)
    return Prompt(ids, text, _offsets(ids, model.text) if body.logprobs is not None else ())


def _offsets(ids: Sequence[int], text: ModelText) -> tuple[int, ...]:
    detokenizer = text.detokenizer(skip_special_tokens=False)
    offsets = []
    length = 0
    for token in ids:
        offsets.append(length)
        length += len(detokenizer.push([token]))
    return tuple(offsets)


def _requests(
    state: ApiState, body: CompletionBody, model: ServedModel, prompts: Sequence[Prompt], arrived: float
) -> list[Request]:
    sampling = sampling_params(body, model, body.logprobs)
    return [
        Request(
            id=state.next_request_id(),
            model=model.name,
            prompt=prompt.ids,
            max_tokens=output_limit(model, len(prompt.ids), body.max_tokens, DEFAULT_MAX_TOKENS, body.min_tokens),
            sampling=sampling,
            arrived=arrived,
            prompt_logprobs=body.logprobs if body.echo else None,
            cache_salt=body.cache_salt or "",
        )
        for prompt in prompts
    ]


class CompletionShape:
    """Whole answers and stream events of text completions, which have one shape.

    The common event, text and nothing else, is put together from encoded halves.
    """

    def __init__(self, generation: Generation, prompts: Sequence[Prompt], body: CompletionBody) -> None:
        self._generation = generation
        self._prompts = prompts
        self._echo = bool(body.echo)
        self._logprobs = body.logprobs
        self._with_usage = body.with_usage
        self._with_timings = body.with_timings
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._opened: dict[int, list[TokenLogprobs]] = {}
        """Prompt log probabilities that came so far, by choice; in a stream they may come in pieces."""
        self._echoed: set[int] = set()
        self._halves: dict[int, tuple[bytes, bytes]] = {}
        """What is before and after the text of an event, by choice that has begun."""

    def events(self, index: int, delta: Delta) -> bytes:
        if index in self._halves and not delta.finish:
            if not delta.content:
                return b""
            before, after = self._halves[index]
            return b"".join((before, msgspec.json.encode(delta.content), after))
        return self._full_events(index, delta)

    def _full_events(self, index: int, delta: Delta) -> bytes:
        if self._echo and index not in self._echoed:
            so_far = self._opened.setdefault(index, [])
            so_far += delta.prompt_logprobs
            missing = self._logprobs is not None and len(so_far) < len(self._prompt(index).ids) - 1
            if missing and not (delta.content or delta.finish):
                return b""
            delta.prompt_logprobs = so_far
        choice = self.choice(index, delta)
        if self._logprobs is None:
            self._halves[index] = split_at_text(self.frame([TextChoice(index, MARK, None, None)], None))
        if not (choice.text or choice.finish_reason or delta.logprobs):
            return b""
        return event(msgspec.json.encode(self.frame([choice], None)))

    def usage(self) -> bytes:
        if not (self._with_usage or self._with_timings):
            return b""
        timings = self._generation.timings if self._with_timings else msgspec.UNSET
        frame = self.frame([], self._generation.usage if self._with_usage else None)
        return event(msgspec.json.encode(msgspec.structs.replace(frame, timings=timings)))

    def choice(self, index: int, delta: Delta) -> TextChoice:
        """What is new of one choice; the first time with the prompt before it where that is echoed."""
        echo = self._echo and index not in self._echoed
        self._echoed.add(index)
        text = self._prompt(index).text + delta.content if echo else delta.content
        finish: FinishReason | None = delta.finish or None
        return TextChoice(index, text, self._text_logprobs(index, delta, echo), finish)

    def frame(self, choices: list[TextChoice], usage: Usage | None) -> TextCompletion:
        generation = self._generation
        return TextCompletion(
            self._id,
            "text_completion",
            generation.created,
            generation.model.name,
            generation.fingerprint,
            choices,
            msgspec.UNSET if usage is None and not self._with_usage else usage,
        )

    def _prompt(self, index: int) -> Prompt:
        return self._prompts[index // (len(self._generation.choices) // len(self._prompts))]

    def _text_logprobs(self, index: int, delta: Delta, echo: bool) -> TextLogprobs | None:
        if self._logprobs is None:
            return None
        text = self._generation.model.text
        prompt = self._prompt(index)
        table = TextLogprobs([], [], [], [])
        if echo:
            for position, token in enumerate(prompt.ids):
                entry = delta.prompt_logprobs[position - 1] if position else None
                _add_row(table, text, token, entry, prompt.offsets[position])
        base = len(prompt.text)
        for logged in delta.logprobs:
            _add_row(table, text, logged.id, logged.entry, base + logged.offset)
        return table


def _add_row(table: TextLogprobs, text: ModelText, token: int, entry: TokenLogprobs | None, offset: int) -> None:
    """``entry`` is None for the first token of a prompt, which nothing predicts."""
    name = _name(text, token)
    table.tokens.append(name)
    table.text_offset.append(offset)
    if entry is None:
        table.token_logprobs.append(None)
        table.top_logprobs.append(None)
        return
    logprob = max(entry.logprob, LOWEST_LOGPROB)
    best = {
        _name(text, each): max(value, LOWEST_LOGPROB)
        for each, value in zip(entry.top_ids, entry.top_logprobs, strict=True)
    }
    table.token_logprobs.append(logprob)
    table.top_logprobs.append({name: logprob} | best)


def _name(text: ModelText, token: int) -> str:
    """Tokens that are no whole characters are told by their bytes, so that two of them do not look the same."""
    raw = text.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
