"""What a load test takes for an answer, a refusal and a failure."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from loadtests.answers import Api, EventStream, Failed
from loadtests.traffic import find_model

DONE = b"data: [DONE]\n\n"


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def chat(text: str) -> bytes:
    return event(choices=[{"delta": {"content": text}}])


def usage(tokens: int) -> bytes:
    return event(choices=[], usage={"completion_tokens": tokens})


def test_times_of_a_stream_are_those_of_its_text() -> None:
    stream = EventStream()
    stream.feed(b": keep-alive\n\n" + event(choices=[{"delta": {"role": "assistant", "content": ""}}]), 11.0)
    stream.feed(chat("a"), 12.0)
    stream.feed(chat("b") + event(choices=[{"delta": {}, "finish_reason": "length"}]), 15.0)
    stream.feed(usage(4) + DONE, 16.0)
    outcome = stream.outcome(sent=10.0, now=17.0)
    assert (outcome.kind, outcome.total, outcome.ttft, outcome.tpot, outcome.tokens) == ("complete", 7.0, 2.0, 1.0, 4)
    assert stream.events == 2


def test_events_may_arrive_in_pieces() -> None:
    stream = EventStream()
    for place, byte in enumerate(event(choices=[{"text": "a"}]) + usage(1) + DONE):
        stream.feed(bytes([byte]), float(place))
    outcome = stream.outcome(0.0, 500.0)
    assert outcome.ttft == len(event(choices=[{"text": "a"}])) - 2
    assert outcome.tpot is None


def test_reasoning_is_text_too() -> None:
    stream = EventStream()
    stream.feed(event(choices=[{"delta": {"reasoning_content": "hm"}}]), 1.0)
    assert stream.first == 1.0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (chat("a") + usage(1), "without an ending"),
        (chat("a") + DONE, "without tokens"),
        (chat("a") + event(error={"type": "server_error", "code": "engine_died"}), "error in the stream: engine_died"),
        (b"data: {\n\n", "no JSON came"),
        (b"data: 1\n\n", "no object came"),
    ],
)
def test_a_stream_that_is_no_answer_fails(data: bytes, reason: str) -> None:
    stream = EventStream()

    def read() -> None:
        stream.feed(data, 1.0)
        stream.outcome(0.0, 2.0)

    with pytest.raises(Failed, match=reason):
        read()


Reply = tuple[int, dict[str, str], bytes]


@contextlib.contextmanager
def answering(replies: Mapping[str, Reply]) -> Iterator[str]:
    """A server that has one reply for each path; its address."""

    class Replies(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = replies[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            # A client that left has closed the connection.
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Replies)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


ERROR = json.dumps({"error": {"code": "overloaded"}}).encode()


@pytest.mark.parametrize(
    ("reply", "kind", "reason"),
    [
        ((200, {}, chat("a") + usage(1) + DONE), "complete", ""),
        ((200, {}, chat("a")), "failed", "a stream without an ending"),
        ((503, {"Retry-After": "2"}, ERROR), "refused", ""),
        ((429, {"Retry-After": "2"}, ERROR), "refused", ""),
        ((503, {}, ERROR), "failed", "http 503 without Retry-After"),
        ((500, {"Retry-After": "2"}, ERROR), "failed", "http 500: overloaded"),
        ((200, {"Content-Length": "1000"}, chat("a")), "failed", "a stream without an ending"),
    ],
)
def test_each_reply_has_one_outcome(reply: Reply, kind: str, reason: str) -> None:
    ticks = iter(range(100))
    with answering({"/x": reply}) as url:
        outcome = Api(url, clock=lambda: float(next(ticks))).ask("/x", {"stream": True})
    assert (outcome.kind, outcome.reason) == (kind, reason)
    assert outcome.total > 0


def test_an_answer_in_one_piece_has_tokens_and_no_first_one() -> None:
    body = json.dumps({"usage": {"completion_tokens": 7}}).encode()
    with answering({"/x": (200, {}, body)}) as url:
        outcome = Api(url).ask("/x", {})
    assert (outcome.kind, outcome.tokens, outcome.ttft) == ("complete", 7, None)


@pytest.mark.parametrize(
    ("headers", "body", "reason"),
    [
        ({"Content-Length": "1000"}, b"{", "connection: IncompleteRead"),
        ({}, b"{", "no JSON came"),
        ({}, b"{}", "an answer without usage"),
    ],
)
def test_a_piece_that_is_no_answer_fails(headers: dict[str, str], body: bytes, reason: str) -> None:
    with answering({"/x": (200, headers, body)}) as url:
        outcome = Api(url).ask("/x", {})
    assert (outcome.kind, outcome.reason) == ("failed", reason)


@pytest.mark.parametrize(("leave_after", "kind"), [(0, "left"), (1, "left"), (5, "complete")])
def test_a_client_leaves_where_it_was_told(leave_after: int, kind: str) -> None:
    # More than one read takes, so that the client is there before the end.
    body = chat("a") + b": wait\n" * 100_000 + chat("b") + usage(2) + DONE
    with answering({"/x": (200, {}, body)}) as url:
        assert Api(url).ask("/x", {"stream": True}, leave_after).kind == kind


def test_no_server_is_a_failure() -> None:
    outcome = Api("http://127.0.0.1:9").ask("/x", {})
    assert (outcome.kind, outcome.reason) == ("failed", "connection: ConnectionRefusedError")


def test_an_address_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="no http or https"):
        Api("file:///etc/passwd")


MODELS = json.dumps({"data": [{"id": "a", "max_model_len": 100}, {"id": "b"}]}).encode()
TOKENS = json.dumps({"tokens": [0] * 500}).encode()


def test_the_server_says_which_model_and_how_long_its_words_are() -> None:
    with answering({"/v1/models": (200, {}, MODELS), "/tokenize": (200, {}, TOKENS)}) as url:
        model = find_model(Api(url), None)
        assert (model.name, model.longest, model.tokens_per_word) == ("a", 100, 2.5)
        with pytest.raises(Failed, match="no model c: it lists a, b"):
            find_model(Api(url), "c")


def test_another_server_that_does_not_count_tokens_is_fine() -> None:
    with answering({"/v1/models": (200, {}, MODELS), "/tokenize": (404, {}, ERROR)}) as url:
        model = find_model(Api(url), "b")
    assert (model.longest, model.tokens_per_word) == (2048, 1.3)
