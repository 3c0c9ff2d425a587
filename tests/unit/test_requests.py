from __future__ import annotations

import asyncio

import pytest

from engines.protocol import SamplingParams, TokenLogprobs
from server.errors import EngineUnavailable
from server.requests import ClientGone, Reply, Request, TokenLog


def make_reply(choices: int = 1) -> tuple[Reply, list[Reply]]:
    sampling = tuple(SamplingParams(seed=1, choice=choice) for choice in range(choices))
    request = Request(id=1, model="m", prompt=[1], max_tokens=9, sampling=sampling, arrived=0.0)
    closed: list[Reply] = []
    return Reply(request, closed.append), closed


def entry(token: int) -> TokenLogprobs:
    return TokenLogprobs(-float(token), [token], [-float(token)])


def test_log_drops_what_it_has_and_refuses_a_gap() -> None:
    log = TokenLog()
    assert log.accept(0, [1, 2]) == [1, 2]
    assert log.accept(1, [2, 3]) == [3]
    assert log.accept(0, [1]) == []
    with pytest.raises(ValueError, match="from index 5"):
        log.accept(5, [9])
    assert log.tokens == [1, 2, 3]


def test_news_of_one_choice_is_gathered_until_taken() -> None:
    reply, _ = make_reply(2)
    reply.deliver(0, 0, [1], "", now=1.0, logprobs=[entry(1)])
    reply.deliver(1, 0, [5], "", now=1.5)
    reply.deliver(0, 1, [2], "length", now=2.0, logprobs=[entry(2)])
    assert reply.pending_tokens == 3
    first, second = reply.take()
    assert (first.choice, first.tokens, first.end) == (0, [1, 2], "length")
    assert [each.logprob for each in first.logprobs] == [-1.0, -2.0]
    assert (second.choice, second.tokens, second.end) == (1, [5], "")
    assert reply.take() == []
    assert reply.pending_tokens == 0
    assert reply.first_token_at == 1.0
    assert not reply.finished


def test_repeated_tokens_bring_no_second_logprobs() -> None:
    reply, _ = make_reply()
    reply.deliver(0, 0, [1], "", now=1.0, logprobs=[entry(1)])
    assert reply.deliver(0, 0, [1, 2], "", now=2.0, logprobs=[entry(1), entry(2)]) == [2]
    (news,) = reply.take()
    assert [each.logprob for each in news.logprobs] == [-1.0, -2.0]


def test_nothing_is_taken_after_the_ending() -> None:
    reply, _ = make_reply()
    reply.deliver(0, 0, [1], "stop", now=1.0)
    assert reply.deliver(0, 1, [2], "length", now=2.0) == []
    assert reply.ends == ["stop"]
    assert reply.finished
    reply.fail(EngineUnavailable("late"))
    assert reply.error is None


def test_choice_ended_by_the_handler_takes_no_more() -> None:
    reply, _ = make_reply(2)
    reply.end_choice(0, "stop")
    assert reply.deliver(0, 0, [1], "", now=1.0) == []
    reply.end_choice(0, "length")
    assert reply.ends == ["stop", ""]


def test_tokens_before_an_error_come_first() -> None:
    reply, _ = make_reply()
    reply.deliver(0, 0, [1], "", now=1.0)
    reply.fail(EngineUnavailable("died"))
    reply.fail(EngineUnavailable("again"))
    assert reply.take()[0].tokens == [1]
    with pytest.raises(EngineUnavailable, match="died"):
        reply.take()
    assert reply.deliver(0, 1, [2], "", now=2.0) == []


def test_close_cancels_what_is_open_once() -> None:
    reply, closed = make_reply(2)
    reply.deliver(0, 0, [1], "stop", now=1.0)
    reply.close()
    reply.close()
    assert closed == [reply]
    assert reply.ends == ["stop", "cancelled"]
    assert reply.deliver(1, 0, [1], "", now=2.0) == []


def test_watcher_is_woken_by_news_by_an_error_and_by_the_end() -> None:
    async def main() -> None:
        reply, _ = make_reply()
        wake = asyncio.Event()
        reply.watch(wake.set)
        assert not wake.is_set()
        reply.deliver(0, 0, [1], "", now=1.0)
        assert wake.is_set()
        wake.clear()
        reply.fail(EngineUnavailable("died"))
        assert wake.is_set()
        wake.clear()
        reply.close()
        assert wake.is_set()

    asyncio.run(main())


def test_taking_after_close_tells_that_the_client_is_gone() -> None:
    reply, _ = make_reply()
    reply.close()
    with pytest.raises(ClientGone):
        reply.take()


def test_overflow_closes_the_reply_and_calls() -> None:
    async def main() -> None:
        reply, closed = make_reply()
        wake = asyncio.Event()
        overflows: list[int] = []
        reply.watch(wake.set, 3, lambda: overflows.append(1))
        reply.deliver(0, 0, [1, 2, 3], "", now=1.0)
        assert wake.is_set()
        assert not overflows
        reply.deliver(0, 3, [4], "", now=2.0)
        assert overflows == [1]
        assert closed == [reply]
        assert reply.ends == ["cancelled"]
        with pytest.raises(ClientGone):
            reply.take()

    asyncio.run(main())


def test_watch_sees_what_came_before() -> None:
    async def main() -> None:
        for happened in ("news", "error"):
            reply, _ = make_reply()
            if happened == "news":
                reply.deliver(0, 0, [1], "", now=1.0)
            else:
                reply.fail(EngineUnavailable("died"))
            wake = asyncio.Event()
            reply.watch(wake.set)
            assert wake.is_set()

    asyncio.run(main())
