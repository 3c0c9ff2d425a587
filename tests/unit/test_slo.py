from __future__ import annotations

import pytest

from engines.protocol import End, SamplingParams
from server.errors import EngineUnavailable, InternalError, Overloaded, QueueTimeout, SlimserveError
from server.requests import Reply, Request
from server.slo import Outcome, outcome


def reply(ttft: float | None, tpot: float | None, tokens: int, first_at: float = 10.5) -> Reply:
    """Arrived at 10; the tokens of one choice come at once."""
    request = Request(0, "m", [1], 64, (SamplingParams(seed=1),), arrived=10.0, ttft=ttft, tpot=tpot)
    made = Reply(request, lambda _: None)
    if tokens:
        made.deliver(0, 0, [7] * tokens, "", now=first_at)
    return made


@pytest.mark.parametrize(
    ("ttft", "tpot", "tokens", "ending", "now", "expected"),
    [
        (None, None, 5, "stop", 11.0, None),
        (0.6, None, 5, "stop", 11.0, "met"),
        (0.4, None, 5, "stop", 11.0, "ttft"),
        (None, 0.1, 6, "length", 11.0, "met"),
        (None, 0.09, 6, "length", 11.0, "tpot"),
        (0.4, 0.01, 6, "stop", 11.0, "ttft"),
        (None, 0.01, 1, "stop", 60.0, "met"),
        (0.6, 0.1, 6, "cancelled", 11.0, None),
        (0.4, 0.1, 6, "cancelled", 11.0, "ttft"),
        (1.0, None, 0, "cancelled", 10.9, None),
        (1.0, None, 0, "cancelled", 11.5, "ttft"),
        (1.0, None, 0, "error", 10.5, "error"),
    ],
)
def test_outcome(
    ttft: float | None, tpot: float | None, tokens: int, ending: End, now: float, expected: Outcome | None
) -> None:
    assert outcome(reply(ttft, tpot, tokens), ending, now) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Overloaded("late"), "refused"),
        (QueueTimeout("client"), "refused"),
        (EngineUnavailable("down"), "error"),
        (InternalError("ours"), "error"),
    ],
)
def test_a_failed_request_missed_its_target(error: SlimserveError, expected: Outcome) -> None:
    failed = reply(1.0, None, 0)
    failed.fail(error)
    assert outcome(failed, "error", 10.1) == expected
