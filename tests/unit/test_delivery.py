from __future__ import annotations

import pytest

from engines.protocol import End, SamplingParams
from server.errors import InternalError
from server.requests import Reply, Request
from server.worker.delivery import ending_of


def reply_of(choices: int = 1, max_tokens: int = 8) -> Reply:
    sampling = tuple(SamplingParams(seed=3, choice=choice) for choice in range(choices))
    request = Request(5, "m", [1, 2, 3], max_tokens, sampling, arrived=10.0, prompt_logprobs=2, cache_salt="tenant")
    return Reply(request, lambda _: None)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [(["stop"], "stop"), (["stop", "length"], "length"), (["length", "cancelled"], "cancelled"), (["error"], "error")],
)
def test_a_request_has_one_ending_whatever_its_choices_have(ends: list[End], expected: End) -> None:
    reply = reply_of(choices=len(ends))
    for choice, end in enumerate(ends):
        reply.deliver(choice, 0, [1], end, now=11.0)
    assert ending_of(reply) == expected


def test_a_failed_request_ends_as_error() -> None:
    reply = reply_of()
    reply.fail(InternalError("broken"))
    assert ending_of(reply) == "error"
