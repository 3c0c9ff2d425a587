"""Each wrong request gets its clear 400, and never reaches the dispatcher."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engines.manifest import Manifest
from server.api.routes import create_api
from tests.unit.api.harness import ScriptedDispatcher, call, make_state

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


def refused(manifest: Manifest, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    dispatcher = ScriptedDispatcher()
    app = create_api(make_state(manifest, dispatcher))
    reply = call(app, ("POST", path, body))[0]
    assert reply.status_code == status, reply.text
    assert not dispatcher.requests
    error: dict[str, Any] = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": USER * 4097}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [*USER, {"role": "user", "content": "x", "foo": 1}]}, "messages[1].foo"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 257}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"min_tokens": 250}, "min_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"261": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop": ["x" * 1025]}, "stop[0]"),
        ({"stop": [5]}, "stop[0]"),
        ({"stop_token_ids": [261]}, "stop_token_ids"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"audio": {}}, "audio"),
        ({"prediction": {"type": "content"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"store": True}, "store"),
        ({"store": 0}, "store"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"temprature": 1}, "temprature"),
        ({"best_of": 2}, "best_of"),
        ({"model": 5}, "model"),
        ({"model": ""}, "model"),
    ],
)
def test_chat_field(manifest: Manifest, fields: dict[str, Any], param: str) -> None:
    error = refused(manifest, CHAT, {"model": "tiny", "messages": USER} | fields)
    assert error["param"] == param
    assert param.split(".")[0].split("[")[0] in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [261]}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 3}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": USER}, "messages"),
    ],
)
def test_completion_field(manifest: Manifest, fields: dict[str, Any], param: str) -> None:
    error = refused(manifest, TEXT, {"model": "tiny", "prompt": "hi"} | fields)
    assert error["param"].startswith(param)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "logprobs: true"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "differ"),
    ],
)
def test_fields_that_do_not_fit_together(manifest: Manifest, fields: dict[str, Any], words: str) -> None:
    error = refused(manifest, CHAT, {"model": "tiny", "messages": USER} | fields)
    assert words in error["message"]
    assert error["param"] in [*fields, "max_tokens"]


def test_too_long_prompt_names_both_numbers(manifest: Manifest) -> None:
    error = refused(manifest, TEXT, {"model": "tiny", "prompt": "a" * 300})
    assert "256" in error["message"]
    assert "300" in error["message"]
    error = refused(manifest, TEXT, {"model": "tiny", "prompt": "a" * 200, "max_tokens": 57})
    assert all(number in error["message"] for number in ("256", "200", "57"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[1]",
        b'"x"',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "tiny", "messages": "\xff"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "\xed\xa0\x80"}',
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny"} {}',
    ],
)
def test_body_that_is_no_proper_json(manifest: Manifest, body: bytes) -> None:
    for path in (CHAT, TEXT, "/tokenize", "/detokenize"):
        refused(manifest, path, body)


@pytest.mark.parametrize(
    "fields",
    [
        {f"field{number}": 1 for number in range(50_000)},
        {"logit_bias": dict.fromkeys(map(str, range(50_000)), "x")},
        {"prompt": ["x", 1] * 50_000},
        {"stop_token_ids": ["x"] * 50_000},
        {"messages": [{}] * 50_000},
    ],
)
def test_many_mistakes_cost_little(manifest: Manifest, fields: dict[str, Any]) -> None:
    error = refused(manifest, TEXT, {"model": "tiny"} | fields)
    assert len(error["message"]) < 600


def test_body_of_another_media_type(manifest: Manifest) -> None:
    import httpx

    async def ask() -> httpx.Response:
        app = create_api(make_state(manifest, ScriptedDispatcher()))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            return await client.post(TEXT, content=json.dumps({"model": "tiny", "prompt": "x"}))

    from tests.unit.api.harness import run

    reply = run(ask())
    assert reply.status_code == 400
    assert "Content-Type: application/json" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": []},
        {"response_format": {"type": "text"}, "modalities": ["text"], "logit_bias": {}},
        {"user": "me", "metadata": {"a": "b"}, "store": False, "safety_identifier": "x", "prompt_cache_key": "y"},
        {"service_tier": "auto", "reasoning_effort": None, "audio": None, "prediction": None, "stop": None},
        {"n": 1.0, "seed": 5.0, "stop_token_ids": [5.0], "max_tokens": 1e1},
        {"stop": [], "seed": None, "stream": None, "temperature": 0, "top_p": 1, "n": None},
    ],
)
def test_values_that_change_nothing_are_accepted(manifest: Manifest, fields: dict[str, Any]) -> None:
    dispatcher = ScriptedDispatcher(lambda *_: "ok")
    app = create_api(make_state(manifest, dispatcher))
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
    }
    body = {"model": "tiny", "messages": [message, *USER]} | fields
    assert call(app, ("POST", CHAT, body))[0].status_code == 200


def test_template_that_raises_is_the_clients_400(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.unit.api.harness import write_model

    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    manifest = write_model(tmp_path_factory.mktemp("raising"), template)
    refused(manifest, CHAT, {"model": "tiny", "messages": [{"role": "system", "content": "x"}]})
