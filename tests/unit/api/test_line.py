"""Streams on a connection of the real HTTP server, over a transport that a test may hold up."""

from __future__ import annotations

import asyncio
import json

import h11
import pytest
import uvicorn
from uvicorn.server import ServerState

from engines.manifest import Manifest
from server.api.line import Line
from server.api.routes import create_api
from server.api.state import ApiSettings
from server.http_server import HttpConnection
from server.requests import Reply
from tests.unit.api.harness import ScriptedDispatcher, make_state, run, until


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[bytes] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closed
        if data:
            self.pieces.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        """Whoever sends is not asked to stop."""

    def resume_reading(self) -> None:
        """It never stopped."""


class Browser:
    """One connection to the server: sends requests and parses what comes back."""

    def __init__(self, manifest: Manifest, dispatcher: ScriptedDispatcher, settings: ApiSettings | None = None) -> None:
        app = create_api(make_state(manifest, dispatcher, settings=settings))
        config = uvicorn.Config(app, http=HttpConnection, lifespan="off", log_config=None, access_log=False)
        config.load()
        self.connection = HttpConnection(config=config, server_state=ServerState(), app_state={})
        self.wire = Wire()
        self.connection.connection_made(self.wire)
        self._parser = h11.Connection(h11.CLIENT)
        self._parsed = 0

    def ask(self, version: str = "1.1", **fields: object) -> None:
        body = json.dumps({"model": "tiny", "prompt": "x", "stream": True, "max_tokens": 100} | fields).encode()
        head = f"POST /v1/completions HTTP/{version}\r\nHost: test\r\nContent-Type: application/json\r\n"
        self.connection.data_received(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self._parser.send(h11.Request(method="POST", target="/", headers=[("host", "test"), ("content-length", "0")]))
        self._parser.send(h11.EndOfMessage())

    def heard(self) -> tuple[str, bool]:
        """Text of the body since the last call, as an HTTP client parses it, and whether the answer is complete."""
        for piece in self.wire.pieces[self._parsed :]:
            self._parser.receive_data(piece)
        self._parsed = len(self.wire.pieces)
        text = b""
        while not isinstance(event := self._parser.next_event(), type(h11.NEED_DATA)):
            if isinstance(event, h11.EndOfMessage):
                self._parser.start_next_cycle()
                return text.decode(), True
            if isinstance(event, h11.Data):
                text += event.data
        return text.decode(), False


def texts(stream: str) -> list[str]:
    """Of the events with a choice."""
    lines = [line.removeprefix("data: ") for line in stream.split("\n\n") if line.startswith("data: {")]
    return [choice["text"] for line in lines for choice in json.loads(line)["choices"]]


async def begun(browser: Browser, dispatcher: ScriptedDispatcher) -> Reply:
    """A stream whose first event is on the wire."""
    browser.ask()
    await until(lambda: dispatcher.replies)
    reply = dispatcher.replies[0]
    reply.deliver(0, 0, [97], "", now=1.0)
    await until(lambda: browser.wire.pieces)
    return reply


def test_each_event_is_one_write_and_the_next_request_finds_the_connection_in_order(manifest: Manifest) -> None:
    async def main() -> None:
        dispatcher = ScriptedDispatcher()
        browser = Browser(manifest, dispatcher)
        for number in range(2):
            browser.ask()
            await until(lambda wanted=number + 1: len(dispatcher.replies) == wanted)  # type: ignore[misc]
            reply = dispatcher.replies[number]
            reply.deliver(0, 0, [97], "", now=1.0)
            await until(lambda: browser.wire.pieces and b'"text":"a"' in browser.wire.pieces[-1])
            before = len(browser.wire.pieces)
            for index in range(1, 5):
                reply.deliver(0, index, [97 + index], "", now=1.0)
                await asyncio.sleep(0)
            assert len(browser.wire.pieces) == before + 4
            reply.deliver(0, 5, [102], "length", now=2.0)
            await until(lambda: browser.wire.pieces[-1].endswith(b"0\r\n\r\n"))
            stream, complete = browser.heard()
            assert complete
            assert "".join(texts(stream)) == "abcdef"
            assert stream.endswith("data: [DONE]\n\n")

    run(main())


def test_what_comes_while_the_buffer_is_full_is_one_event_afterwards(manifest: Manifest) -> None:
    async def main() -> None:
        dispatcher = ScriptedDispatcher()
        browser = Browser(manifest, dispatcher)
        reply = await begun(browser, dispatcher)
        browser.connection.pause_writing()
        for index in range(1, 6):
            reply.deliver(0, index, [97 + index], "", now=1.0)
            await asyncio.sleep(0)
        assert texts(browser.heard()[0]) == ["a"]
        browser.connection.resume_writing()
        await until(lambda: not reply.pending_tokens)
        reply.deliver(0, 6, [103], "length", now=2.0)
        await until(lambda: browser.wire.pieces[-1].endswith(b"0\r\n\r\n"))
        stream, complete = browser.heard()
        assert complete
        assert texts(stream)[:2] == ["b", "cdef"]
        assert "".join(texts(stream)) == "bcdefg"

    run(main())


def test_client_that_does_not_read_is_cancelled(manifest: Manifest) -> None:
    async def main() -> None:
        dispatcher = ScriptedDispatcher()
        browser = Browser(manifest, dispatcher, ApiSettings(max_pending_tokens=8))
        reply = await begun(browser, dispatcher)
        browser.connection.pause_writing()
        for index in range(1, 12):
            reply.deliver(0, index, [97], "", now=1.0)
            await asyncio.sleep(0)
        await until(lambda: dispatcher.closed)
        assert reply.ends == ["cancelled"]

    run(main())


def test_client_that_leaves_cancels_its_stream(manifest: Manifest) -> None:
    async def main() -> None:
        dispatcher = ScriptedDispatcher()
        browser = Browser(manifest, dispatcher)
        reply = await begun(browser, dispatcher)
        browser.wire.close()
        reply.deliver(0, 1, [98], "", now=1.0)
        browser.connection.connection_lost(None)
        await until(lambda: dispatcher.closed)
        assert reply.ends == ["cancelled"]

    run(main())


def test_old_clients_get_no_chunks(manifest: Manifest) -> None:
    async def main() -> None:
        dispatcher = ScriptedDispatcher(lambda request, choice: "abc")
        browser = Browser(manifest, dispatcher)
        browser.ask("1.0", max_tokens=3)
        await until(lambda: browser.wire.closed)
        head, _, body = b"".join(browser.wire.pieces).partition(b"\r\n\r\n")
        assert b"chunked" not in head
        assert body.startswith(b"data: {")
        assert "".join(texts(body.decode())) == "abc"

    run(main())


@pytest.mark.parametrize("state", ["unopened", "full", "closed"])
def test_line_refuses_what_it_cannot_write_now(state: str) -> None:
    line, wire = Line(), Wire()
    if state != "unopened":
        line.opened(wire)
    line.paused = state == "full"
    wire.closed = state == "closed"
    assert not line.write(b"x")
    assert not wire.pieces
