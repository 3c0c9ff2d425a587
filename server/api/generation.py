"""What chat and text completions share: building requests, sending them, and reading the replies as text."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive

from engines.protocol import SamplingParams, TokenLogprobs
from server.api.choices import ChoiceText, Delta, TextOptions
from server.api.exchange import Exchange, News
from server.api.replies import CompletionTokensDetails, PromptTokensDetails, Timings, Usage
from server.api.schemas import GenerationBody
from server.api.service import Service
from server.api.state import ApiState, PlainModel, ServedModel
from server.errors import EngineUnavailable, InternalError, InvalidRequest, ModelNotFound, SlimserveError
from server.request_record import GenerationRecord
from server.requests import ChoiceNews, Reply, Request

T = TypeVar("T")

_SEEDS = 1 << 64


def find_model(state: ApiState, name: str | None) -> ServedModel:
    """Raises ModelNotFound, InvalidRequest where a name is needed to choose, or EngineUnavailable at the start."""
    if name in state.coming or (name is None and state.coming):
        raise EngineUnavailable("The server starts: its models are not here yet.", retry_after=5)
    if name is None:
        if len(state.language_models) != 1:
            raise InvalidRequest("model: several models are served, name one of them", param="model")
        return next(iter(state.language_models.values()))
    model = state.models.get(name)
    if isinstance(model, PlainModel):
        raise InvalidRequest(
            f"The model {name!r} generates no text: it takes tensors, at /v2/models/{name}/infer", param="model"
        )
    if model is None:
        raise ModelNotFound(
            f"The model {name!r} is not served here. GET /v1/models lists those that are.", param="model"
        )
    return model


async def off_loop(state: ApiState, work: Callable[..., T], *arguments: Any) -> T:
    """Run what blocks (tokenizing, templates) in the bounded executor."""
    return await asyncio.get_running_loop().run_in_executor(state.executor, work, *arguments)


def sampling_params(body: GenerationBody, model: ServedModel, logprobs: int | None) -> tuple[SamplingParams, ...]:
    """One entry a choice. Where the request is silent the model's own defaults apply, then OpenAI's."""
    manifest = model.manifest
    check_token_ids(body.stop_token_ids or (), model, "stop_token_ids")
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    check_token_ids(bias, model, "logit_bias")

    def pick(name: str, default: float) -> float:
        given: float | None = getattr(body, name)
        return manifest.sampling_defaults.get(name, default) if given is None else given

    stop_ids = {*(body.stop_token_ids or ()), *(() if body.ignore_eos else manifest.eos_token_ids)}
    seed = secrets.randbelow(_SEEDS) if body.seed is None else body.seed % _SEEDS
    first = SamplingParams(
        seed=seed,
        temperature=pick("temperature", 1.0),
        top_p=pick("top_p", 1.0),
        top_k=max(int(pick("top_k", 0)), 0),
        min_p=pick("min_p", 0.0),
        repetition_penalty=pick("repetition_penalty", 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=tuple(sorted(bias.items())),
        logprobs=logprobs,
        min_tokens=body.min_tokens or 0,
        stop_token_ids=tuple(sorted(stop_ids)),
    )
    return tuple(msgspec.structs.replace(first, choice=choice) for choice in range(body.choices))


def check_token_ids(ids: Collection[int], model: ServedModel, param: str) -> None:
    size = model.manifest.vocab_size
    if max(ids, default=0) >= size:
        wrong = next(token for token in ids if token >= size)
        raise InvalidRequest(f"{param}: token id {wrong} is outside the vocabulary of {size} tokens", param=param)


def output_limit(
    model: ServedModel, prompt_tokens: int, asked: int | None, default: int | None, min_tokens: int | None
) -> int:
    """Most output tokens of each choice; raises InvalidRequest where prompt and output do not fit the context.

    ``asked`` is the request's own limit; without it ``default`` applies as far as the context allows (None: all of it).
    """
    if not prompt_tokens:
        raise InvalidRequest("The prompt is empty.", param="prompt")
    room = model.max_model_len - prompt_tokens
    context = f"The model's context is {model.max_model_len} tokens, but the prompt has {prompt_tokens}"
    if room < 0 or (room == 0 and asked != 0):
        raise InvalidRequest(f"{context}.", param="prompt")
    if asked is not None and asked > room:
        raise InvalidRequest(f"{context} and max_tokens asks for {asked} more.", param="max_tokens")
    limit = asked if asked is not None else room if default is None else min(default, room)
    if min_tokens is not None and min_tokens > limit:
        raise InvalidRequest(f"min_tokens is {min_tokens}, but at most {limit} tokens come out.", param="min_tokens")
    return limit


class Generation:
    """All choices of one HTTP request, numbered over its prompts: choice c of prompt p has index ``p * n + c``."""

    def __init__(
        self,
        state: ApiState,
        model: ServedModel,
        requests: Sequence[Request],
        options: TextOptions,
        service: Service,
    ) -> None:
        self.model = model
        self.requests = [service.apply(request) for request in requests]
        self._tenant = service.tenant.name
        self._record = service.record
        self.created = int(state.wall_clock())
        self.fingerprint = f"fp_{model.manifest.fingerprint[:12]}"
        self.choices = [
            ChoiceText(model.text, sampling, options) for request in requests for sampling in request.sampling
        ]
        self._state = state
        self._per_request = len(requests[0].sampling)
        self._replies: list[Reply] = []
        self._unfinished = len(self.choices)

    @property
    def finished(self) -> bool:
        return not self._unfinished

    def start(self, receive: Receive, tick: float | None = None) -> Exchange:
        """Send all requests; nothing stays behind when one is refused. Raises what ``Dispatcher.submit`` raises.

        ``tick`` marks a stream, whose client may be slow; what a whole answer gathers is bounded by its length.
        """
        noted = self._note_submission(streamed=tick is not None)
        try:
            for request in self.requests:
                self._replies.append(self._state.dispatcher.submit(request))
        except SlimserveError as error:
            for reply in self._replies:
                reply.close()
            if noted is not None:
                noted.refusal = error.reason
            seconds = self._state.clock() - self.requests[0].arrived
            self._state.metrics.refused(self.model.name, error.reason, self._tenant, seconds)
            raise
        self._state.quotas.charge(self._tenant, sum(len(request.prompt) for request in self.requests))
        if noted is not None:
            noted.admitted = self._state.clock()
        limit = None if tick is None else self._state.settings.max_pending_tokens * self._per_request
        return Exchange(self._replies, receive, self._closed, max_pending_tokens=limit, tick=tick)

    def _note_submission(self, *, streamed: bool) -> GenerationRecord | None:
        if self._record is None:
            return None
        noted = self._record.generation = GenerationRecord(
            model=self.model.name,
            arrived=self.requests[0].arrived,
            submitted=self._state.clock(),
            prompt_tokens=sum(len(request.prompt) for request in self.requests),
            replies=self._replies,
            streamed=streamed,
        )
        return noted

    def _closed(self) -> None:
        """What was computed counts, also where the client left before it had it all."""
        tokens = sum(len(log.tokens) for reply in self._replies for log in reply.logs)
        self._state.quotas.charge(self._tenant, tokens)
        if self._record is not None and (noted := self._record.generation) is not None:
            noted.ended = self._state.clock()
            noted.output_tokens = self.usage.completion_tokens
            noted.finish_reasons = tuple(choice.finish or "cancelled" for choice in self.choices)

    def read(self, news: News) -> list[tuple[int, Delta]]:
        """Text that the news adds, by choice index."""
        return [
            (index, self._read_choice(index, self._replies[request], each))
            for request, each in news
            if not self.choices[index := request * self._per_request + each.choice].finish
        ]

    def _read_choice(self, index: int, reply: Reply, news: ChoiceNews) -> Delta:
        if news.end == "cancelled" or news.end == "error":
            raise InternalError("The model could not finish this answer.", log=f"choice {index} ended as {news.end}")
        choice = self.choices[index]
        delta = choice.push(news)
        if choice.finish:
            self._unfinished -= 1
            if not news.end:
                self._state.dispatcher.stop_choice(reply, news.choice)
        return delta

    @property
    def usage(self) -> Usage:
        """Each prompt counts once, whatever ``n``."""
        prompt = sum(len(request.prompt) for request in self.requests)
        completion = sum(choice.completion_tokens for choice in self.choices)
        return Usage(
            prompt,
            completion,
            prompt + completion,
            PromptTokensDetails(sum(reply.cached_tokens for reply in self._replies)),
            CompletionTokensDetails(sum(choice.reasoning_tokens for choice in self.choices)),
        )

    @property
    def timings(self) -> Timings:
        """Of an answer that has just ended."""
        arrived, now = self.requests[0].arrived, self._state.clock()
        firsts = [reply.first_token_at for reply in self._replies if reply.first_token_at is not None]
        steps = sum(reply.steps for reply in self._replies)
        return Timings(
            queue_ms=_milliseconds(max(reply.queue_seconds for reply in self._replies)),
            ttft_ms=_milliseconds(min(firsts, default=now) - arrived),
            total_ms=_milliseconds(now - arrived),
            batch_mean=round(sum(reply.step_rows for reply in self._replies) / max(steps, 1), 2),
            batch_max=max(reply.largest_step for reply in self._replies),
        )


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 2)


async def run_to_end(generation: Generation, receive: Receive) -> list[Delta]:
    """All of each choice in one Delta. Raises the error that ended a reply, and ClientGone when the client leaves."""
    whole = [Delta() for _ in generation.choices]
    contents: list[list[str]] = [[] for _ in whole]
    thoughts: list[list[str]] = [[] for _ in whole]
    prompts: list[list[TokenLogprobs]] = [[] for _ in whole]

    def gather(news: News) -> bool:
        for index, delta in generation.read(news):
            contents[index].append(delta.content)
            thoughts[index].append(delta.reasoning)
            whole[index].logprobs += delta.logprobs
            prompts[index] += delta.prompt_logprobs
            whole[index].finish = delta.finish
        return generation.finished

    async with generation.start(receive) as exchange:
        await exchange.feed(gather)
    for delta, content, thought, prompt in zip(whole, contents, thoughts, prompts, strict=True):
        delta.prompt_logprobs = prompt
        delta.content = "".join(content)
        delta.reasoning = "".join(thought)
    return whole
