"""Whether a request met its targets: what goodput counts."""

from __future__ import annotations

from typing import Literal, get_args

from engines.protocol import End
from server.errors import Overloaded, QueueTimeout
from server.requests import Reply, Request

Outcome = Literal["met", "ttft", "tpot", "refused", "error"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


def was_refused(reply: Reply) -> bool:
    """While it waited, for lack of capacity: nothing went wrong."""
    return isinstance(reply.error, Overloaded | QueueTimeout)


def has_target(request: Request) -> bool:
    return request.ttft is not None or request.tpot is not None


def outcome(reply: Reply, ending: End, now: float) -> Outcome | None:
    """Of a request that is over at ``now``; ``ttft`` and ``tpot`` name the target that it missed, the first one first.

    None where it had no target, or where its client left before it had missed one.
    """
    request = reply.request
    if not has_target(request):
        return None
    if reply.error is not None:
        return "refused" if was_refused(reply) else "error"
    if ending == "error":
        return "error"
    first = now if reply.first_token_at is None else reply.first_token_at
    if request.ttft is not None and first - request.arrived > request.ttft:
        return "ttft"
    later = max(len(log.tokens) for log in reply.logs) - 1
    if request.tpot is not None and later > 0 and now - first > request.tpot * later:
        return "tpot"
    return None if ending == "cancelled" else "met"
