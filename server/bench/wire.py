"""What the bench's main process and its client processes tell each other: JSON lines over standard input and output."""

from __future__ import annotations

from typing import Literal

import msgspec

PromptKind = Literal["ids", "words", "chat"]


class Ask(msgspec.Struct, frozen=True):
    """One request to make."""

    at: float
    """Seconds after the start; 0 for all in a closed loop."""
    input_tokens: int
    output_tokens: int


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """All that one client process has to do."""

    url: str
    """Base of the server's routes, such as http://127.0.0.1:8000/v1."""
    model: str
    api_key: str | None
    prompt: PromptKind
    vocab: int
    temperature: float
    ignore_eos: bool
    timeout: float
    """Seconds after which a request counts as failed."""
    concurrency: int
    """Streams of a closed loop; 0 sends each request at its time, however many are open."""
    asks: list[Ask]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one request. Times in seconds of the machine's monotonic clock."""

    due: float
    """When it should have been sent; in a closed loop, when it was."""
    sent: float
    first: float = 0.0
    """Arrival of the first event with a token; 0 where none came. ``last`` likewise."""
    last: float = 0.0
    ended: float
    longest_gap: float = 0.0
    """Between two events with tokens."""
    events: int = 0
    """Events with tokens."""
    input_tokens: int = 0
    tokens: int = 0
    """Output tokens as the server counts them, or the events where it does not tell."""
    counted: bool = False
    """The server told its count."""
    error: str = ""
    """Kind of failure; empty for a complete answer."""
    detail: str = ""


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """How the client process itself did. Times in seconds."""

    cpu_share: float
    """Of one core."""
    loop_lag_p99: float
    """How much later than asked its event loop ran a timer."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """All prompts are made."""


class Start(msgspec.Struct, frozen=True):
    """Begin at this time of the machine's monotonic clock."""

    at: float


class Finished(msgspec.Struct, frozen=True, tag=True):
    health: Health


class Done(msgspec.Struct, frozen=True, tag=True):
    outcome: Outcome


FromClient = Ready | Done | Finished
