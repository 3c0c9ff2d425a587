"""One streamed answer, cut into pieces anywhere."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.response import BadResponseError, BodyReader, EventLog

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(piece: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": piece, "finish_reason": finish}])


def chunked(*pieces: bytes) -> bytes:
    return b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces) + b"0\r\n\r\n"


def read(reader: BodyReader, data: bytes, cuts: list[int]) -> bytes:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return b"".join(reader.feed(data[start:end]) for start, end in itertools.pairwise(places))


@given(
    pieces=st.lists(st.binary(min_size=1, max_size=40), max_size=6), cuts=st.lists(st.integers(0, 10_000), max_size=12)
)
def test_a_chunked_body_comes_out_whole_however_it_is_cut(pieces: list[bytes], cuts: list[int]) -> None:
    reader = BodyReader()
    data = HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunked(*pieces)
    assert read(reader, data[:-1], cuts) == b"".join(pieces)
    before = reader.done
    reader.feed(data[-1:])
    assert (before, reader.done) == (False, True)
    assert reader.status == 200
    assert reader.keep_alive


@given(body=st.binary(max_size=60), cuts=st.lists(st.integers(0, 10_000), max_size=8))
def test_a_body_of_known_length(body: bytes, cuts: list[int]) -> None:
    reader = BodyReader()
    head = f"HTTP/1.1 503 Busy\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    assert read(reader, head + body, cuts) == body
    assert reader.done
    assert reader.status == 503
    assert not reader.keep_alive


def test_a_body_without_length_ends_with_the_connection_and_a_cut_chunked_one_does_not() -> None:
    reader = BodyReader()
    assert reader.feed(HEAD + b"\r\nabc") == b"abc"
    before = reader.done
    reader.closed()
    assert (before, reader.done) == (False, True)
    broken = BodyReader()
    broken.feed(HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nab")
    broken.closed()
    assert not broken.done


def test_an_interim_response_is_skipped() -> None:
    reader = BodyReader()
    assert reader.feed(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi") == b"hi"
    assert reader.status == 200


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        HEAD + b"content-length: many\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nxyz\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n-5\r\n",
        HEAD + b"x" * 70_000,
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"1" * 70_000,
    ],
)
def test_what_is_no_http_is_refused(data: bytes) -> None:
    with pytest.raises(BadResponseError):
        BodyReader().feed(data)


@given(cuts=st.lists(st.integers(0, 10_000), max_size=12))
def test_events_are_counted_however_they_are_cut(cuts: list[int]) -> None:
    log = EventLog()
    usage = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3})
    data = b": keep-alive\n\n" + text("a") + text("b") + text("c", "length") + usage + b"data: [DONE]\n\n"
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for now, (start, end) in enumerate(itertools.pairwise(places)):
        log.feed(data[start:end], float(now))
    assert (log.events, log.input_tokens, log.output_tokens, log.complete, log.error) == (3, 7, 3, True, "")


def test_first_last_and_the_longest_gap() -> None:
    log = EventLog()
    for now, piece in ((1.0, "a"), (1.5, "b"), (3.5, "c"), (4.0, "d")):
        log.feed(text(piece), now)
    assert (log.first, log.last, log.longest_gap) == (1.0, 4.0, 2.0)


@pytest.mark.parametrize(
    ("choice", "counts"),
    [
        ({"delta": {"role": "assistant", "content": ""}}, False),
        ({"delta": {"role": "assistant", "content": "Hi"}}, True),
        ({"delta": {"content": "Hi"}}, True),
        ({"delta": {"reasoning_content": "Hm"}}, True),
        ({"delta": {}, "finish_reason": "stop"}, False),
        ({"text": "", "finish_reason": "length"}, False),
        ({"text": "x", "finish_reason": "length"}, True),
        ({"text": "", "finish_reason": None}, True),
    ],
)
def test_only_events_that_stand_for_a_token_count(choice: dict[str, object], counts: bool) -> None:
    log = EventLog()
    log.feed(event(choices=[{"index": 0, **choice}]), 1.0)
    assert log.events == counts


def test_an_error_event_is_kept_and_what_is_no_event_is_refused() -> None:
    log = EventLog()
    log.feed(event(error={"message": "the worker died"}), 1.0)
    assert "the worker died" in log.error
    assert not log.complete
    with pytest.raises(BadResponseError):
        log.feed(b"data: <html>\n\n", 2.0)
    with pytest.raises(BadResponseError):
        log.feed(b"x" * (5 << 20), 3.0)
