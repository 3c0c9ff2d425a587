"""Request bodies, each field with its type and bounds. What is not here is refused by name.

Fields that only some values of leave the answer unchanged are typed to take just those values; see ``unsupported``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.api.field_types import (
    INTEGRAL,
    MAX_TOKENS,
    ModelName,
    PromptIds,
    Refused,
    RefusedList,
    RefusedUnlessFalse,
    StopString,
    TemplateKwargs,
    TokenIds,
    unsupported,
)

MAX_STOPS = 16
MAX_PROMPTS = 256
MAX_INPUTS = 2048
MAX_CHOICES = 128
MAX_LOGPROBS = 20


class Body(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class StreamOptions(Body):
    include_usage: bool | None = None
    """Send one more chunk with ``usage`` and no choices before ``[DONE]``."""
    include_timings: bool | None = None
    """Send how the stream was served, as ``timings`` of that same chunk."""
    include_obfuscation: RefusedUnlessFalse = None


class ServiceLevel(Body):
    """Targets in milliseconds. A request whose first token must come too late is refused instead."""

    ttft_ms: Annotated[float, Field(ge=1, le=600_000)] | None = None
    """From arrival to the first token. Default: the server's for the class."""
    tpot_ms: Annotated[float, Field(ge=0.1, le=60_000)] | None = None
    """Mean of each later token."""


class GenerationBody(Body):
    """What chat and text completions have in common."""

    model: ModelName
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS), INTEGRAL] | None = None
    """Most output tokens."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), INTEGRAL] | None = None
    """Choices for each prompt. Default 1."""
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63), INTEGRAL] | None = None
    """Equal requests with equal seeds get equal answers. Drawn if absent."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the best token. Default: the model's own, else 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31), INTEGRAL] | None = None
    """-1 or 0 keep all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern="^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=1024, json_schema_extra={"additionalProperties": False}),
        ]
        | None
    ) = None
    """Added to the logits of these token ids."""
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    """The answer ends before the first of these texts."""
    stop_token_ids: Annotated[TokenIds, Field(max_length=128)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS), INTEGRAL] | None = None
    """No end token is drawn before this many output tokens."""
    ignore_eos: bool | None = None
    """Go on after the model's own end token."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text. Default true."""
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    """Requests of different salts share no cached prefix."""
    priority: Literal["high", "normal", "low"] | None = None
    """Class of the request; higher ones go first, and none starves. Default normal."""
    slo: ServiceLevel | None = None
    """Latency that the request wants."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None
    """Accepted and not used, like ``metadata``."""
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None

    @model_validator(mode="after")
    def _options_fit(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def with_timings(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_timings)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class TextPart(Body):
    type: Literal["text"]
    text: Annotated[str, Field(max_length=1 << 23)]


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    """Text, or parts of type ``text`` that are joined by line breaks."""
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None
    """What an assistant thought before it answered; ``reasoning`` is the same field's other name."""
    reasoning: str | None = None
    tool_calls: RefusedList = None
    function_call: Refused = None
    annotations: RefusedList = None
    audio: Refused = None
    refusal: Refused = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and (self.reasoning_content or self.reasoning)):
            raise ValueError("a message needs content")
        return self


class ChatBody(GenerationBody):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS), INTEGRAL] | None = None
    """Most output tokens. Default: what the context leaves."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS), INTEGRAL] | None = None
    """The newer name of ``max_tokens``."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), INTEGRAL] | None = None
    """Best alternatives at each position; needs ``logprobs``."""
    add_generation_prompt: bool | None = None
    """Let the template open the assistant's turn. Default true."""
    chat_template_kwargs: TemplateKwargs | None = None
    """More variables for the chat template, such as ``enable_thinking``."""
    store: RefusedUnlessFalse = None
    safety_identifier: Annotated[str, Field(max_length=1024)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
    parallel_tool_calls: bool | None = None
    """Without tools it changes nothing."""
    tools: RefusedList = None
    tool_choice: Annotated[Any, *unsupported("none", "auto")] = None
    functions: RefusedList = None
    function_call: Annotated[Any, *unsupported("none", "auto")] = None
    response_format: Annotated[Any, *unsupported({"type": "text"})] = None
    modalities: Annotated[Any, *unsupported(["text"])] = None
    service_tier: Annotated[Any, *unsupported("auto", "default")] = None
    verbosity: Annotated[Any, *unsupported("medium")] = None
    reasoning_effort: Refused = None
    audio: Refused = None
    prediction: Refused = None
    web_search_options: Refused = None

    @model_validator(mode="after")
    def _fields_fit(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ")
        return self


class CompletionBody(GenerationBody):
    """POST /v1/completions"""

    prompt: (
        str
        | PromptIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[PromptIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    """One text, or its token ids, or a list of either."""
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS), INTEGRAL] | None = None
    """Most output tokens; 0 only with ``echo``. Default 16, as far as the context allows."""
    echo: bool | None = None
    """Put the prompt before the answer."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), INTEGRAL] | None = None
    add_special_tokens: bool | None = None
    """Let the tokenizer add its begin token to a text. Default true."""
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES), INTEGRAL] | None = None
    """Must equal ``n``."""
    suffix: Annotated[Any, *unsupported("")] = None

    @model_validator(mode="after")
    def _fields_fit(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 is only allowed with echo: true")
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError("best_of is not supported unless it equals n")
        return self


class TokenizeBody(Body):
    """POST /tokenize: ``prompt`` or ``messages``"""

    model: ModelName | None = None
    """May be left out where one model is served."""
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    """Default true for a prompt; a chat template writes its own special tokens."""
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """POST /detokenize"""

    model: ModelName | None = None
    tokens: TokenIds


class EmbeddingBody(Body):
    """POST /v1/embeddings"""

    model: ModelName
    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    """One text, or a list of them."""
    encoding_format: Literal["float", "base64"] | None = None
    """Numbers, or the bytes of 32-bit floats as base64, which is shorter. Default float."""
    truncate: bool | None = None
    """Cut texts that are longer than the model takes, instead of refusing them."""
    priority: Literal["high", "normal", "low"] | None = None
    user: str | None = None
    """Taken, and not used."""
    dimensions: Refused = None


REQUEST_BODIES = (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody)
FIELD_NAMES = frozenset(
    name
    for model in (*REQUEST_BODIES, EmbeddingBody, Message, TextPart, StreamOptions, ServiceLevel)
    for name in model.model_fields
)
