"""The openai SDK over HTTP against the application with the fake engine in the same process: fast, and exact."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from server.api.state import ApiSettings
from server.errors import Overloaded
from server.tenants import TenantTable
from tests.integration.in_process import Running, serving
from tests.unit.api.harness import MAX_MODEL_LEN, close_texts, write_model

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]
KEY = "sesame"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    manifest = write_model(tmp_path_factory.mktemp("tiny"))
    with serving(manifest, ApiSettings(), TenantTable(api_keys=(KEY,))) as server:
        yield server
    close_texts()


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, timeout=30) as sdk:
        yield sdk


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "slimserve"


def test_chat_is_what_the_engine_says(client: openai.OpenAI, running: Running) -> None:
    reply = client.chat.completions.create(model="tiny", messages=HELLO, seed=5, max_tokens=40)
    assert reply.choices[0].message.content == running.expected_text(5, 40)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 40


def test_stream_with_usage_equals_the_whole(client: openai.OpenAI, running: Running) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            seed=6,
            max_tokens=60,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    for choice in (0, 1):
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice]
        assert "".join(each.delta.content or "" for each in mine) == running.expected_text(6, 60, choice)
        assert mine[-1].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 120


def test_logprobs(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tiny", messages=HELLO, seed=1, max_tokens=9, logprobs=True, top_logprobs=3
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    raw = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert raw.decode(errors="replace") == reply.choices[0].message.content
    assert all(len(entry.top_logprobs) == 3 and entry.logprob == -0.5 for entry in logprobs.content)


def test_seed_repeats_and_differs(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        return client.completions.create(model="tiny", prompt="a", seed=seed, max_tokens=30).choices[0].text

    assert text(7) == text(7) != text(8)


def test_stop_string_cuts_and_frees(client: openai.OpenAI, running: Running) -> None:
    whole = running.expected_text(9, 100)
    stop = next(char for char in whole if char.isascii() and whole.index(char) > 10)
    reply = client.chat.completions.create(model="tiny", messages=HELLO, seed=9, max_tokens=200, stop=stop)
    assert reply.choices[0].message.content == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"
    wait_until_free(running)


def test_second_prompt_finds_the_first_in_the_cache(client: openai.OpenAI) -> None:
    for expected in (0, 96):
        usage = client.completions.create(model="tiny", prompt="prefix" * 17, max_tokens=1).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == expected


def test_echo_with_logprobs(client: openai.OpenAI) -> None:
    prompt = "echo " * 40
    choice = client.completions.create(model="tiny", prompt=prompt, echo=True, logprobs=2, max_tokens=0).choices[0]
    assert choice.text == prompt
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [None] + [-0.5] * (len(prompt) - 1)
    assert choice.logprobs.text_offset == list(range(len(prompt)))


def test_errors_are_the_sdk_classes(client: openai.OpenAI, running: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="lora-adapter", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=[])
    assert bad.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match=str(MAX_MODEL_LEN)):
        client.completions.create(model="tiny", prompt=[5] * 4000)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model="tiny", prompt="x" * (9 << 20))
    assert large.value.status_code == 413


def test_refusal_reaches_the_sdk_with_its_retry_after(
    client: openai.OpenAI, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: object) -> None:
        raise Overloaded("full", retry_after=3)

    monkeypatch.setattr(running.dispatcher, "submit", refuse)
    with pytest.raises(openai.InternalServerError) as refused:
        client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    assert refused.value.status_code == 503
    assert refused.value.response.headers["retry-after"] == "3"


def test_error_in_mid_stream_is_the_sdks_api_error(
    client: openai.OpenAI, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = running.dispatcher.submit

    def submit_and_fail(request):  # type: ignore[no-untyped-def]
        reply = submit(request)
        deliver = reply.deliver

        def deliver_once(*arguments: object, **options: object) -> Sequence[int]:
            fresh = deliver(*arguments, **options)  # type: ignore[arg-type]
            reply.fail(Overloaded("lost"))
            return fresh

        monkeypatch.setattr(reply, "deliver", deliver_once)
        return reply

    monkeypatch.setattr(running.dispatcher, "submit", submit_and_fail)
    stream = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=50, stream=True)
    with pytest.raises(openai.APIError, match="lost") as broken:
        list(stream)
    assert broken.value.code == "overloaded"
    monkeypatch.undo()
    wait_until_free(running)


def test_cancel_in_mid_stream_frees_the_blocks(
    client: openai.OpenAI, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = running.dispatcher.engine.collect

    def slowly(ticket: int) -> object:
        time.sleep(0.02)
        return collect(ticket)

    monkeypatch.setattr(running.dispatcher.engine, "collect", slowly)
    stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    for index, _ in enumerate(stream):
        if index == 3:
            break
    assert running.blocks_used() > 0
    stream.close()
    wait_until_free(running)


def test_client_that_leaves_a_whole_answer_frees_the_blocks(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = running.dispatcher.engine.collect

    def slowly(ticket: int) -> object:
        time.sleep(0.05)
        return collect(ticket)

    monkeypatch.setattr(running.dispatcher.engine, "collect", slowly)
    body = json.dumps({"model": "tiny", "messages": HELLO}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        wait_for(lambda: running.blocks_used() > 0)
    wait_until_free(running, within=2.0)


def test_body_of_100_mb_gets_its_answer_and_a_good_stream_goes_on(client: openai.OpenAI, running: Running) -> None:
    stream = client.chat.completions.create(model="tiny", messages=HELLO, seed=3, max_tokens=200, stream=True)
    reply = httpx.post(
        f"{running.url}/v1/completions",
        content=b"x" * (100 << 20),
        headers={"authorization": f"Bearer {KEY}", "content-type": "application/json"},
        timeout=60,
    )
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "body_too_large"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == running.expected_text(3, 200)


def wait_until_free(running: Running, within: float = 10.0) -> None:
    wait_for(lambda: running.blocks_used() == 0, within)
    assert running.dispatcher.scheduler.integrity() == []


def wait_for(condition, within: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
