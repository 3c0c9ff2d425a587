"""Response bodies: msgspec structs, encoded as they are and described in the OpenAPI schema."""

from __future__ import annotations

from typing import Literal

import msgspec

from engines.engine_folder import Quality

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write."""

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Timings(msgspec.Struct, frozen=True):
    """How a stream was served, in milliseconds of the server's clock. Of several prompts: of all together."""

    queue_ms: float
    """From the scheduler's queue to the first step; of several prompts the longest."""
    ttft_ms: float
    """From arrival to the first token."""
    total_ms: float
    """From arrival to the end."""
    batch_mean: float
    """Sequences in the steps that gave this stream its tokens, those of other requests counted in."""
    batch_max: int


# --- chat


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob]


class AssistantMessage(msgspec.Struct, frozen=True):
    role: Literal["assistant"]
    content: str
    reasoning_content: str | msgspec.UnsetType | None = msgspec.UNSET
    """Only of models that reason; null where this answer has none."""
    reasoning: str | msgspec.UnsetType | None = msgspec.UNSET
    """The same under its other name."""


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(msgspec.Struct, frozen=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(msgspec.Struct, frozen=True):
    """One event of a stream. ``usage`` is there where ``include_usage`` was set, and null but in the last, and
    ``timings`` only in the last where ``include_timings`` was."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    timings: Timings | msgspec.UnsetType = msgspec.UNSET


# --- completions


class TextLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    """Null only in a stream."""


class TextCompletion(msgspec.Struct, frozen=True):
    """A whole answer, or one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    timings: Timings | msgspec.UnsetType = msgspec.UNSET


# --- the rest


class ModelCard(msgspec.Struct, frozen=True):
    id: str
    created: int
    max_model_len: int
    """Longest sequence in tokens, prompt and output together."""
    object: Literal["model"] = "model"
    owned_by: str = "slimserve"
    quality: Quality | msgspec.UnsetType = msgspec.UNSET
    """Summary of the evaluation card, of a model that has one."""


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class Tokenized(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(msgspec.Struct, frozen=True):
    prompt: str


class ReloadOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a reload changes. Models load and drain after the answer: ``/health/ready`` tells how far they are."""

    added: list[str]
    changed: list[str]
    removed: list[str]
    settings: list[str]
    """Names of changed settings beside the models."""


class Version(msgspec.Struct, frozen=True):
    version: str


class Liveness(msgspec.Struct, frozen=True):
    status: Literal["live", "stalled"]


class ModelReadiness(msgspec.Struct, frozen=True):
    """Where one model stands; ``done`` and ``total`` are bytes of the load phase, or 0 where it has no measure."""

    name: str
    state: str
    phase: str
    done: int
    total: int
    reason: str


class Readiness(msgspec.Struct, frozen=True):
    status: Literal["ready", "not ready"]
    models: list[ModelReadiness]


class Embedding(msgspec.Struct, frozen=True):
    index: int
    embedding: list[float] | str
    """Numbers, or 32-bit floats, little-endian, as base64."""
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True):
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"
