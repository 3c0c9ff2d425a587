"""How a stream behaves in time: status line, shared events, keep-alive, errors, clients that leave or do not read."""

from __future__ import annotations

import asyncio
import json

import pytest

from engines.manifest import Manifest
from server.api.routes import create_api
from server.api.state import ApiSettings
from server.errors import EngineUnavailable, Overloaded
from server.requests import Reply
from tests.unit.api.harness import Connection, Now, ScriptedDispatcher, make_state, run, until

BODY = {"model": "tiny", "prompt": "x", "stream": True, "max_tokens": 100}


def open_stream(
    manifest: Manifest, settings: ApiSettings | None = None, **fields: object
) -> tuple[ScriptedDispatcher, Connection]:
    dispatcher = ScriptedDispatcher()
    app = create_api(make_state(manifest, dispatcher, settings=settings))
    return dispatcher, Connection(app, "/v1/completions", BODY | fields)


def parsed(connection: Connection) -> list[object]:
    lines = [line for line in connection.text.split("\n\n") if line]
    return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]


def test_status_line_waits_for_the_first_token(manifest: Manifest) -> None:
    async def main() -> None:
        dispatcher, stream = open_stream(manifest)
        await until(lambda: dispatcher.replies)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not stream.sent
        dispatcher.replies[0].deliver(0, 0, [97], "", now=1.0)
        await until(lambda: '"text":"a"' in stream.text)
        assert stream.status == 200
        headers = dict(stream.sent[0]["headers"])
        assert headers[b"content-type"].startswith(b"text/event-stream")
        assert headers[b"cache-control"] == b"no-cache"
        assert headers[b"x-accel-buffering"] == b"no"
        dispatcher.replies[0].deliver(0, 1, [98], "length", now=2.0)
        await stream.task
        assert stream.text.endswith("data: [DONE]\n\n")
        assert not stream.sent[-1].get("more_body", False)

    run(main())


def test_refusal_before_the_first_token_has_its_own_status(manifest: Manifest) -> None:
    async def main() -> None:
        dispatcher, stream = open_stream(manifest)
        await until(lambda: dispatcher.replies)
        dispatcher.replies[0].fail(Overloaded("no room", retry_after=2))
        await stream.task
        assert stream.status == 503
        assert dict(stream.sent[0]["headers"])[b"retry-after"] == b"2"
        assert dispatcher.closed == dispatcher.replies

    run(main())


def test_tokens_ready_together_share_an_event(manifest: Manifest) -> None:
    async def main() -> None:
        dispatcher, stream = open_stream(manifest, n=2)
        await until(lambda: dispatcher.replies)
        stream.writable.clear()
        reply = dispatcher.replies[0]
        reply.deliver(0, 0, [97], "", now=1.0)
        await until(lambda: not reply.pending_tokens)
        for index in range(1, 6):
            reply.deliver(0, index, [97 + index], "", now=1.0)
            reply.deliver(1, index - 1, [97 + index], "", now=1.0)
        stream.writable.set()
        await until(lambda: not reply.pending_tokens)
        reply.deliver(0, 6, [122], "length", now=2.0)
        reply.deliver(1, 5, [], "length", now=2.0)
        await stream.task
        texts = [(event["choices"][0]["index"], event["choices"][0]["text"]) for event in parsed(stream)]  # type: ignore[index]
        assert texts == [(0, "a"), (0, "bcdef"), (1, "bcdef"), (0, "z"), (1, "")]

    run(main())


def test_error_in_mid_stream_is_one_event_and_no_done(manifest: Manifest) -> None:
    async def main() -> None:
        dispatcher, stream = open_stream(manifest)
        await until(lambda: dispatcher.replies)
        dispatcher.replies[0].deliver(0, 0, [97], "", now=1.0)
        dispatcher.replies[0].fail(EngineUnavailable("the worker stopped"))
        await stream.task
        first, last = parsed(stream)
        assert first["choices"][0]["text"] == "a"  # type: ignore[index]
        assert last == {
            "error": {
                "message": "the worker stopped",
                "type": "engine_unavailable",
                "param": None,
                "code": "engine_unavailable",
            }
        }
        assert "[DONE]" not in stream.text

    run(main())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_that_asks_is_told_how_it_was_served(manifest: Manifest, path: str, usage: bool) -> None:
    async def main() -> None:
        dispatcher, now = ScriptedDispatcher(), Now(10.0)
        state = make_state(manifest, dispatcher, clock=now)
        prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
        options = {"include_timings": True, "include_usage": usage}
        stream = Connection(
            create_api(state), path, {"model": "tiny", "stream": True, "stream_options": options} | prompt
        )
        await until(lambda: dispatcher.replies)
        (reply,) = dispatcher.replies
        reply.queue_seconds = 0.25
        for index, rows in enumerate((2, 4, 3)):
            reply.deliver(0, index, [97], "length" if index == 2 else "", now=11.0 + index)
            reply.took_part(rows)
        now.seconds = 14.0
        await stream.task
        *others, last = parsed(stream)
        assert all("timings" not in chunk for chunk in others)  # type: ignore[operator]
        assert last["choices"] == []  # type: ignore[index]
        assert ("usage" in last) is usage  # type: ignore[operator]
        assert last["timings"] == {  # type: ignore[index]
            "queue_ms": 250.0,
            "ttft_ms": 1000.0,
            "total_ms": 4000.0,
            "batch_mean": 3.0,
            "batch_max": 4,
        }

    run(main())


def test_fault_of_our_own_in_mid_stream_tells_nothing(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(ScriptedDispatcher):
        def stop_choice(self, reply: Reply, choice: int) -> None:
            raise RuntimeError("secret of the house")

    async def main() -> None:
        dispatcher = Faulty()
        app = create_api(make_state(manifest, dispatcher))
        stream = Connection(app, "/v1/completions", BODY | {"stop": "b"})
        await until(lambda: dispatcher.replies)
        dispatcher.replies[0].deliver(0, 0, [97], "", now=1.0)
        await until(lambda: stream.sent)
        dispatcher.replies[0].deliver(0, 1, [98], "", now=1.0)
        await stream.task
        assert "internal error" in stream.text
        assert "secret" not in stream.text
        assert dispatcher.closed == dispatcher.replies

    run(main())
    assert "secret of the house" in caplog.text


def test_silence_is_filled_with_comments(manifest: Manifest) -> None:
    async def main() -> None:
        dispatcher, stream = open_stream(manifest, ApiSettings(keep_alive=0.01))
        await until(lambda: stream.text.count(": keep-alive\n\n") >= 2)
        assert stream.status == 200
        dispatcher.replies[0].deliver(0, 0, [97], "length", now=1.0)
        await stream.task
        assert stream.text.endswith("data: [DONE]\n\n")

    run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_cancels_its_request(manifest: Manifest, stream: bool) -> None:
    async def main() -> None:
        dispatcher, connection = open_stream(manifest, stream=stream)
        await until(lambda: dispatcher.replies)
        dispatcher.replies[0].deliver(0, 0, [97], "", now=1.0)
        connection.leave()
        await connection.task
        assert dispatcher.closed == dispatcher.replies
        assert dispatcher.replies[0].ends == ["cancelled"]

    run(main())


def test_client_that_does_not_read_is_cancelled_alone(manifest: Manifest) -> None:
    async def main() -> None:
        dispatcher, stream = open_stream(manifest, ApiSettings(max_pending_tokens=8))
        await until(lambda: dispatcher.replies)
        other = Connection(stream.app, "/v1/completions", BODY)
        await until(lambda: len(dispatcher.replies) == 2)
        stream.writable.clear()
        for index in range(12):
            for reply in dispatcher.replies:
                reply.deliver(0, index, [97], "", now=1.0)
            await until(lambda: not dispatcher.replies[1].pending_tokens)
        await stream.task
        slow, quick = dispatcher.replies
        assert slow.ends == ["cancelled"]
        assert dispatcher.closed == [slow]
        quick.deliver(0, 12, [98], "length", now=1.0)
        await other.task
        assert other.text.endswith("data: [DONE]\n\n")

    run(main())


def test_nothing_after_a_stop_string_is_sent_or_counted(manifest: Manifest) -> None:
    async def main() -> None:
        options = {"include_usage": True}
        dispatcher, stream = open_stream(manifest, stop=["STOP"], stream_options=options)
        await until(lambda: dispatcher.replies)
        dispatcher.replies[0].deliver(0, 0, list(b"go ST"), "", now=1.0)
        await until(lambda: '"text":"go "' in stream.text)
        dispatcher.replies[0].deliver(0, 5, list(b"OP and more"), "", now=1.0)
        await stream.task
        assert dispatcher.stopped == [(0, 0)]
        *_, end, usage = parsed(stream)
        assert end["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}  # type: ignore[index]
        assert usage["usage"]["completion_tokens"] == len("go STOP")  # type: ignore[index]

    run(main())


def test_choice_that_ends_as_an_error_fails_the_request(manifest: Manifest) -> None:
    async def main() -> None:
        dispatcher, connection = open_stream(manifest, stream=False)
        await until(lambda: dispatcher.replies)
        dispatcher.replies[0].deliver(0, 0, [97], "error", now=1.0)
        await connection.task
        assert connection.status == 500

    run(main())
