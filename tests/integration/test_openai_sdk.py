"""The official openai SDK against a real server with a real model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import openai
import pytest

from benchmarks.servers import Server
from tests.metrics_text import metric, wait_until, wait_until_zero

MODEL = "smollm2"


@pytest.fixture
def client(real_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="unused", max_retries=0) as sdk:
        yield sdk


def ask(text: str) -> list[openai.types.chat.ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def test_chat_gives_a_sensible_answer(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=ask("What is the capital of France?"), temperature=0, max_tokens=40
    )
    assert "Paris" in (reply.choices[0].message.content or "")
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_streamed_chat_equals_the_whole_one_and_reports_usage(client: openai.OpenAI) -> None:
    def request() -> dict[str, object]:
        return {"model": MODEL, "messages": ask("Name three colours."), "temperature": 0, "max_tokens": 32}

    whole = client.chat.completions.create(**request())  # type: ignore[call-overload]
    chunks = list(
        client.chat.completions.create(**request(), stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_logprobs_are_of_the_tokens_in_the_answer(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=ask("Say hello."), temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content).startswith(reply.choices[0].message.content or "?")
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert entry.logprob <= 0


def test_choices_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str | None]:
        reply = client.chat.completions.create(
            model=MODEL, messages=ask("Invent a name for a cat."), n=2, seed=seed, temperature=1.0, max_tokens=24
        )
        assert [choice.index for choice in reply.choices] == [0, 1]
        return [choice.message.content for choice in reply.choices]

    first = texts(7)
    assert first[0] != first[1]
    assert texts(7) == first
    assert texts(8) != first


def test_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", stop=["7"], temperature=0, max_tokens=40)
    assert reply.choices[0].finish_reason == "stop"
    assert "6" in reply.choices[0].text
    assert "7" not in reply.choices[0].text


def test_completion_echoes_the_prompt_with_logprobs(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt="The sky is blue", echo=True, logprobs=2, max_tokens=0, temperature=0
    )
    choice = reply.choices[0]
    assert choice.text == "The sky is blue"
    assert choice.logprobs is not None
    first, *others = cast(list[float | None], choice.logprobs.token_logprobs)
    assert first is None
    assert all(value is not None and value <= 0 for value in others)


def test_errors_are_the_sdk_exception_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="no-such-model", messages=ask("hi"))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=[])
    assert bad.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="2048"):
        client.completions.create(model=MODEL, prompt=[5] * 4000)


def test_cancel_in_mid_stream_frees_the_blocks(client: openai.OpenAI, real_server: Server) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=ask("Tell a very long story."),
        max_tokens=1500,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for index, _ in enumerate(stream):
        if index == 3:
            break
    wait_until(lambda: metric(real_server.url, "slimserve_kv_blocks_used") > 0)
    stream.close()
    wait_until_zero(real_server.url, "slimserve_kv_blocks_used", "slimserve_requests_running")
