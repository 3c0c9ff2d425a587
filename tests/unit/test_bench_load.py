"""What the user asks for becomes requests: times, lengths, traces, targets."""

from __future__ import annotations

import itertools
import random
import statistics
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.bench.arrivals import Lengths, poisson, read_trace, replay
from server.bench.client import request_of
from server.bench.connection import Address
from server.bench.load import Load, choose_load, parse_slo
from server.bench.wire import Ask, Job
from server.errors import UsageError

TRACES = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"
NO_LIMIT = Lengths(1, 1 << 20)


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    asks = poisson(4000, 8.0, Lengths(256, 768), Lengths(64, 320), seed=1)
    gaps = [later.at - earlier.at for earlier, later in itertools.pairwise(asks)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 8, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(1 / 8, rel=0.08)
    assert min(gaps) >= 0
    assert {min(ask.input_tokens for ask in asks), max(ask.input_tokens for ask in asks)} == {256, 768}
    assert {min(ask.output_tokens for ask in asks), max(ask.output_tokens for ask in asks)} == {64, 320}


def test_a_seed_repeats_times_and_lengths_and_another_does_not() -> None:
    first, again, other = (
        Load(requests=20, inputs=NO_LIMIT, outputs=NO_LIMIT, rate=5).asks(seed) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(("text", "least", "most"), [("512", 512, 512), (" 256-768 ", 256, 768), ("1", 1, 1)])
def test_lengths(text: str, least: int, most: int) -> None:
    assert Lengths.parse(text, "--input") == Lengths(least, most)


@pytest.mark.parametrize("text", ["", "0", "768-256", "-5", "many", "1-2-3", "9999999"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--input"):
        Lengths.parse(text, "--input")


def csv_trace(folder: Path) -> Path:
    path = folder / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:05.9799600,3180,8\n"
        "2023-11-16 18:17:04.4799600,20,0\n"
    )
    return path


def test_a_csv_trace_is_sorted_and_starts_at_zero(tmp_path: Path) -> None:
    asks = read_trace(csv_trace(tmp_path))
    assert [ask.at for ask in asks] == pytest.approx([0.0, 0.5, 2.0], abs=1e-5)
    assert [(ask.input_tokens, ask.output_tokens) for ask in asks] == [(4808, 10), (20, 1), (3180, 8)]


def test_a_jsonl_trace_is_in_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 500, "input_length": 67, "output_length": 5, "hash_ids": [0]}\n' * 2)
    assert read_trace(path) == [Ask(0.0, 67, 5)] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trace.txt", "x", "a .csv or a .jsonl file"),
        ("trace.csv", "A,B\n1,2\n", "fields of a trace"),
        ("trace.jsonl", "not json\n", "fields of a trace"),
        ("trace.jsonl", '["a"]\n', "fields of a trace"),
        ("trace.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "is empty"),
        ("trace.csv", None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_trace(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        read_trace(tmp_path / name)


@pytest.mark.skipif(not TRACES.exists(), reason="the public traces are not beside the repository")
@pytest.mark.parametrize("path", sorted(TRACES.glob("*")), ids=lambda path: path.name)
def test_the_public_traces_can_be_read(path: Path) -> None:
    asks = read_trace(path)
    assert len(asks) > 5000
    assert all(earlier.at <= later.at for earlier, later in itertools.pairwise(asks))


def test_a_replay_takes_a_window_stretches_it_and_clips_lengths() -> None:
    trace = [Ask(float(second), 100 * second + 1, second + 1) for second in range(100)]
    own = replay(trace, 11, None, NO_LIMIT, NO_LIMIT, seed=5)
    assert [ask.at for ask in own] == list(range(11))
    fast = replay(trace, 11, 20.0, Lengths(1, 500), Lengths(3, 8), seed=5)
    assert [ask.at for ask in fast] == pytest.approx([index / 20 for index in range(11)])
    assert max(ask.input_tokens for ask in fast) <= 500
    assert {ask.output_tokens for ask in fast} <= set(range(3, 9))
    assert replay(trace, 11, None, NO_LIMIT, NO_LIMIT, seed=6)[0] != own[0]
    with pytest.raises(UsageError, match="holds 100 requests"):
        replay(trace, 101, None, NO_LIMIT, NO_LIMIT, seed=0)


def test_targets() -> None:
    assert parse_slo("ttft=200ms, tpot=15ms") == {"ttft": 0.2, "tpot": 0.015}
    assert parse_slo("") == {}


@pytest.mark.parametrize("text", ["speed=5", "ttft", "ttft=soon"])
def test_targets_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--slo"):
        parse_slo(text)


@pytest.mark.parametrize(
    "options", [{}, {"rate": 1.0, "concurrency": 2}, {"concurrency": 2, "trace": Path("trace.csv")}]
)
def test_loads_that_do_not_say_when_requests_come(options: dict[str, Any]) -> None:
    nothing = {"rate": None, "trace": None, "concurrency": None, "requests": 5, "inputs": None, "outputs": None}
    with pytest.raises(UsageError, match="--rate"):
        choose_load(**nothing | options)


def make_job(**fields: Any) -> Job:
    values: dict[str, Any] = {
        "url": "http://host:81/base/v1",
        "model": "m",
        "api_key": None,
        "prompt": "ids",
        "vocab": 50,
        "temperature": 0.5,
        "ignore_eos": True,
        "timeout": 9.0,
        "concurrency": 0,
        "asks": [],
    }
    return Job(**values | fields)


def test_a_request_is_plain_http_with_fresh_token_ids() -> None:
    job, ask, randomness = make_job(), Ask(0.0, 30, 7), random.Random(1)
    requests = [request_of(job, ask, Address.parse(job.url), randomness) for _ in range(2)]
    bodies = []
    for request in requests:
        head, _, payload = request.partition(b"\r\n\r\n")
        assert head.startswith(b"POST /base/v1/completions HTTP/1.1\r\nHost: host:81\r\n")
        assert f"Content-Length: {len(payload)}".encode() in head
        assert b"Authorization" not in head
        bodies.append(msgspec.json.decode(payload))
    first, second = bodies
    assert len(first["prompt"]) == 30
    assert all(0 <= token < 50 for token in first["prompt"])
    assert first["prompt"] != second["prompt"]
    assert (first["max_tokens"], first["ignore_eos"], first["stream_options"]) == (7, True, {"include_usage": True})


def test_a_chat_request_carries_words_and_the_key() -> None:
    job = make_job(prompt="chat", api_key="secret", ignore_eos=False)
    request = request_of(job, Ask(0.0, 12, 7), Address.parse(job.url), random.Random(1))
    head, _, payload = request.partition(b"\r\n\r\n")
    assert b"/v1/chat/completions" in head
    assert b"Authorization: Bearer secret" in head
    body = msgspec.json.decode(payload)
    assert len(body["messages"][0]["content"].split()) == 12
    assert "ignore_eos" not in body


@pytest.mark.parametrize("url", ["host:80", "ftp://host/v1", "http://", "http://host:port"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL|[Pp]ort"):
        Address.parse(url)


def test_addresses() -> None:
    assert Address.parse("https://host/v1") == Address("host", 443, True, "/v1")
    assert Address.parse("http://[::1]:8000/v1/").authority == "[::1]:8000"
