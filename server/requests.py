"""A request on its way through the API process: what was asked, what came back so far, and its one ending."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from engines.protocol import End, SamplingParams, TokenLogprobs
from server.errors import SlimserveError

if TYPE_CHECKING:
    from server.worker.wire import Priority


@dataclass(frozen=True, slots=True)
class Targets:
    """Seconds; None aims at nothing."""

    ttft: float | None = None
    """From arrival to the first token."""
    tpot: float | None = None
    """Mean of each later token."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and its n choices, parsed, validated and tokenized. Times in seconds of the monotonic clock."""

    id: int
    model: str
    prompt: list[int]
    max_tokens: int
    """Most output tokens of each choice."""
    sampling: tuple[SamplingParams, ...]
    """One entry a choice; they differ in ``choice`` only."""
    arrived: float
    prompt_logprobs: int | None = None
    cache_salt: str = ""
    """Prompts of different salts share no cached prefix; it names the tenant too."""
    priority: Priority = "normal"
    tenant: str = ""
    weight: float = 1.0
    """Share of the tenant beside others of the same priority."""
    ttft: float | None = None
    """Target from arrival to the first token; None aims at nothing. So does ``tpot``."""
    tpot: float | None = None
    """Target for the mean of each later token."""
    firm: bool = False
    """Operator or client set the targets: refuse rather than miss the first token's."""
    timeout: float | None = None
    """From arrival, until the client no longer waits for the first token."""
    http_id: str = ""
    """``X-Request-ID`` of the HTTP request that it came with, for the log."""
    rows: int = 0
    """Of a plain model's batch, which has one choice and no prompt; 0 marks a prompt."""
    bucket: int = 0
    """Shape bucket of the rows: only equal ones share a step."""
    inputs: bytes = b""
    """Packed tensors of the rows."""


@dataclass(slots=True)
class TokenLog:
    """Output tokens of one choice, in order. Together with the prompt it is all that a replay needs."""

    tokens: list[int] = field(default_factory=list)

    def accept(self, first_index: int, tokens: Sequence[int]) -> Sequence[int]:
        """Append what is new and return it. Tokens that the log has already are dropped; a gap raises ValueError."""
        known = len(self.tokens) - first_index
        if known < 0:
            raise ValueError(f"tokens from index {first_index} on, but the log ends at {len(self.tokens)}")
        if known:
            tokens = tokens[known:]
        self.tokens.extend(tokens)
        return tokens


class ClientGone(Exception):
    """Nobody takes the answer: the client left, or it reads too slowly for its bounded buffer."""


@dataclass(slots=True)
class ChoiceNews:
    """What happened to one choice since the last flush."""

    choice: int
    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    end: End = ""
    output: bytes = b""
    """Packed tensors of a plain model."""

    def add(self, later: ChoiceNews) -> None:
        """What happened to the same choice afterwards."""
        self.tokens = [*self.tokens, *later.tokens]
        self.logprobs = [*self.logprobs, *later.logprobs]
        self.prompt_logprobs = [*self.prompt_logprobs, *later.prompt_logprobs]
        self.end = later.end
        self.output = later.output


def _nobody() -> None:
    """Waits for a reply that no handler watches yet."""


class Reply:
    """Tokens of all choices of one request, from the worker to the HTTP handler: a buffer and one flush.

    The supervisor calls ``deliver`` and ``fail``; one handler calls ``watch`` and ``take``. After every
    choice has ended, or after ``fail`` or ``close``, nothing more is taken: each reply has exactly one ending.
    """

    def __init__(self, request: Request, on_close: Callable[[Reply], None]) -> None:
        self.request = request
        self.logs = [TokenLog() for _ in request.sampling]
        self.ends: list[End] = [""] * len(request.sampling)
        self.error: SlimserveError | None = None
        self.cached_tokens = 0
        self.queue_seconds = 0.0
        self.offered_at: list[float] = []
        """When it was given to a worker: again after that worker's death."""
        self.first_token_at: float | None = None
        self.steps = 0
        """That gave it tokens, once for each choice; ``step_rows`` sequences took part in them."""
        self.step_rows = 0
        self.largest_step = 0
        self._news: dict[int, ChoiceNews] = {}
        self._pending_tokens = 0
        self._max_pending_tokens: int | None = None
        self._on_overflow: Callable[[], None] | None = None
        self._wake: Callable[[], None] = _nobody
        self._on_close = on_close
        self._closed = False

    @property
    def finished(self) -> bool:
        """Every choice has ended, or the request failed."""
        return self.error is not None or all(self.ends)

    @property
    def pending_tokens(self) -> int:
        """Tokens that the handler has not fetched yet."""
        return self._pending_tokens

    def watch(
        self,
        wake: Callable[[], None],
        max_pending_tokens: int | None = None,
        on_overflow: Callable[[], None] | None = None,
    ) -> None:
        """Call ``wake`` on news from now on: one handler may wait for several replies at once.

        More than ``max_pending_tokens`` unfetched tokens close the reply: ``take`` then raises ClientGone, and
        ``on_overflow`` is called for a handler that is stuck in writing.
        """
        if self._news or self.error is not None:
            wake()
        self._wake = wake
        self._max_pending_tokens = max_pending_tokens
        self._on_overflow = on_overflow

    def unwatch(self) -> None:
        """The handler goes, and holds this reply no longer than this reply holds it."""
        self.watch(_nobody)

    def took_part(self, rows: int) -> None:
        """One of its choices got tokens in a step of so many sequences."""
        self.steps += 1
        self.step_rows += rows
        if rows > self.largest_step:
            self.largest_step = rows

    def deliver(
        self,
        choice: int,
        first_index: int,
        tokens: Sequence[int],
        end: End,
        *,
        now: float,
        logprobs: Sequence[TokenLogprobs] = (),
        prompt_logprobs: Sequence[TokenLogprobs] = (),
        output: bytes = b"",
    ) -> Sequence[int]:
        """Log tokens of one choice and wake the handler; returns those that were new (none after the ending)."""
        if self._closed or self.error is not None or self.ends[choice]:
            return []
        fresh = self.logs[choice].accept(first_index, tokens)
        if self.first_token_at is None and fresh:
            self.first_token_at = now
        logprobs = logprobs and logprobs[len(tokens) - len(fresh) :]
        news = ChoiceNews(choice, fresh, logprobs, prompt_logprobs, end, output)
        pending = self._news.get(choice)
        if pending is None:
            self._news[choice] = news
        else:
            pending.add(news)
        self.ends[choice] = end
        self._pending_tokens += len(fresh)
        self._wake()
        if self._max_pending_tokens is not None and self._pending_tokens > self._max_pending_tokens:
            self._overflow()
        return fresh

    def _overflow(self) -> None:
        self._news = {}
        self._pending_tokens = 0
        self.close()
        if self._on_overflow is not None:
            self._on_overflow()

    def end_choice(self, choice: int, end: End) -> None:
        """The handler ends one choice itself (a stop string); later tokens are dropped."""
        self.ends[choice] = self.ends[choice] or end

    def fail(self, error: SlimserveError) -> None:
        """End the whole request with an error; ignored when it has ended."""
        if not self.finished and not self._closed:
            self.error = error
            self._wake()

    def take(self) -> list[ChoiceNews]:
        """All news since the last call, perhaps none.

        Raises the error that ended the request once all that was delivered before it has been taken, and ClientGone
        after ``close``.
        """
        if not self._news:
            if self.error is not None:
                raise self.error
            if self._closed:
                raise ClientGone
            return []
        news = list(self._news.values())
        self._news = {}
        self._pending_tokens = 0
        return news

    def close(self) -> None:
        """The handler is done: answered, failed or left by its client. Unfinished choices are cancelled. Idempotent."""
        if not self._closed:
            self._closed = True
            self.ends = [end or "cancelled" for end in self.ends]
            self._wake()
            self._on_close(self)


class Dispatcher(Protocol):
    """Where requests go: the supervisor, or a plain object in a test."""

    def submit(self, request: Request) -> Reply:
        """File the request. Raises ModelNotFound, EngineUnavailable or Overloaded; after that the reply tells all."""

    def stop_choice(self, reply: Reply, choice: int) -> None:
        """End one choice as "stop" (a stop string was found); its blocks return at the next settle."""
