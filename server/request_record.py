"""What happened to one HTTP request, and when: for its trace and for its line in the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from server.requests import Reply


@dataclass(slots=True)
class GenerationRecord:
    """The model's part. Times in seconds of the monotonic clock, as in ``RequestRecord``."""

    model: str
    arrived: float
    submitted: float
    """Parsed and tokenized; from here on the door looked at it."""
    prompt_tokens: int
    """Of all prompts, each once."""
    replies: Sequence[Reply]
    """One a prompt; fewer where the door refused."""
    streamed: bool
    admitted: float | None = None
    """None where it was refused; ``refusal`` says why."""
    refusal: str = ""
    ended: float | None = None
    """Its last token came, or nobody waited any more."""
    output_tokens: int = 0
    finish_reasons: tuple[str, ...] = ()
    """Of each choice; "cancelled" where it did not come to an end."""

    @property
    def first_token_at(self) -> float | None:
        return min((reply.first_token_at for reply in self.replies if reply.first_token_at is not None), default=None)

    @property
    def queue_seconds(self) -> float:
        """The longest of its prompts."""
        return max((reply.queue_seconds for reply in self.replies), default=0.0)

    @property
    def error(self) -> str:
        """Why it failed after it was admitted, or empty."""
        return next((reply.error.reason for reply in self.replies if reply.error is not None), "")


@dataclass(slots=True)
class RequestRecord:
    """The HTTP side."""

    id: str
    method: str
    path: str
    """As it was sent, without the query."""
    began: float
    parent: dict[str, str] = field(default_factory=dict)
    """The client's ``traceparent`` and ``tracestate``."""
    route: str = ""
    """The path's pattern; empty where nothing answers there."""
    status: int | None = None
    """None where the client left before there was one."""
    answered_at: float | None = None
    """The status line was written."""
    ended: float = 0.0
    generation: GenerationRecord | None = None
