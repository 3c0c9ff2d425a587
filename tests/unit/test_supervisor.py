from __future__ import annotations

import itertools

import pytest

from engines.protocol import End, SamplingParams
from server.errors import InternalError
from server.requests import Reply, Request
from server.worker.supervisor import ending_of, replay_items


def reply_of(choices: int = 1, max_tokens: int = 8) -> Reply:
    sampling = tuple(SamplingParams(seed=3, choice=choice) for choice in range(choices))
    request = Request(5, "m", [1, 2, 3], max_tokens, sampling, arrived=10.0, prompt_logprobs=2, cache_salt="tenant")
    return Reply(request, lambda _: None)


def test_a_new_reply_becomes_one_item_a_choice() -> None:
    items = replay_items(reply_of(choices=2), itertools.count(40), now=10.25)
    assert [(item.item, item.sampling.choice) for item in items] == [(40, 0), (41, 1)]
    assert all(item.request == 5 and item.engine == "m" and item.cache_salt == "tenant" for item in items)
    assert all(item.tokens == [1, 2, 3] and item.prompt_length == 3 and item.max_tokens == 8 for item in items)
    assert items[0].waited == 0.25
    assert items[0].prompt_logprobs == 2


def test_replay_carries_the_log_and_leaves_out_what_has_ended() -> None:
    reply = reply_of(choices=3)
    reply.deliver(0, 0, [7, 8], "", now=11.0)
    reply.deliver(1, 0, [9], "stop", now=11.0)
    items = replay_items(reply, itertools.count(1), now=12.0)
    assert [(item.item, item.sampling.choice, item.tokens) for item in items] == [
        (1, 0, [1, 2, 3, 7, 8]),
        (2, 2, [1, 2, 3]),
    ]
    assert all(item.prompt_length == 3 for item in items)


def test_replay_of_an_ended_reply_is_empty_and_takes_no_number() -> None:
    reply = reply_of()
    reply.deliver(0, 0, [7], "length", now=11.0)
    numbers = itertools.count(1)
    assert replay_items(reply, numbers, now=12.0) == []
    assert next(numbers) == 1


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
