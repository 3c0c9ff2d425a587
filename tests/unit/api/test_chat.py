from __future__ import annotations

import json

from engines.manifest import Manifest
from tests.unit.api.harness import IM_END, ScriptedDispatcher, events, make_state, post

HELLO = [{"role": "user", "content": "Hello"}]


def test_answer_has_openai_shape(manifest: Manifest) -> None:
    dispatcher = ScriptedDispatcher(lambda *_: "Good day")
    dispatcher.cached_tokens = 16
    reply = post(make_state(manifest, dispatcher), "/v1/chat/completions", messages=HELLO).json()
    prompt = len(dispatcher.requests[0].prompt)
    assert reply.pop("id").startswith("chatcmpl-")
    assert reply.pop("system_fingerprint") == f"fp_{manifest.fingerprint[:12]}"
    assert reply == {
        "object": "chat.completion",
        "created": 1700000001,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Good day"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": 9,
            "total_tokens": prompt + 9,
            "prompt_tokens_details": {"cached_tokens": 16},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }
    assert dispatcher.closed == dispatcher.replies


def test_prompt_is_the_rendered_template(manifest: Manifest) -> None:
    dispatcher = ScriptedDispatcher(lambda *_: "ok")
    state = make_state(manifest, dispatcher)
    messages = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    post(state, "/v1/chat/completions", messages=messages)
    post(state, "/v1/chat/completions", messages=messages, add_generation_prompt=False)
    text = state.language_models["tiny"].text
    rendered = "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
    assert dispatcher.requests[0].prompt == text.encode(rendered + "<|im_start|>assistant\n", False)
    assert dispatcher.requests[1].prompt == text.encode(rendered, False)


def test_sampling_comes_from_the_request_then_the_model_then_openai(
    manifest: Manifest, untemplated_manifest: Manifest
) -> None:
    dispatcher = ScriptedDispatcher(lambda *_: "ok")
    fields = {"temperature": 0.5, "top_k": -1, "seed": -1, "logit_bias": {"65": 2}, "presence_penalty": 1}
    post(make_state(manifest, dispatcher), "/v1/chat/completions", messages=HELLO, n=2, **fields)
    first, second = dispatcher.requests[0].sampling
    assert (first.temperature, first.top_k, first.seed, first.top_p) == (0.5, 0, 2**64 - 1, 1.0)
    assert first.logit_bias == ((65, 2.0),)
    assert first.stop_token_ids == manifest.eos_token_ids
    assert (first.choice, second.choice, second.seed, second.temperature) == (0, 1, first.seed, 0.5)
    state = make_state(untemplated_manifest, dispatcher)
    post(state, "/v1/completions", prompt="x")
    post(state, "/v1/completions", prompt="x", temperature=0.75, ignore_eos=True, stop_token_ids=[7])
    assert (dispatcher.requests[1].sampling[0].temperature, dispatcher.requests[1].sampling[0].top_k) == (0.25, 40)
    assert dispatcher.requests[2].sampling[0].temperature == 0.75
    assert dispatcher.requests[2].sampling[0].stop_token_ids == (7,)


def test_absent_seeds_differ(manifest: Manifest) -> None:
    dispatcher = ScriptedDispatcher(lambda *_: "ok")
    state = make_state(manifest, dispatcher)
    for _ in range(4):
        post(state, "/v1/chat/completions", messages=HELLO)
    assert len({request.sampling[0].seed for request in dispatcher.requests}) == 4


def test_limit_is_the_context_or_what_was_asked(manifest: Manifest) -> None:
    dispatcher = ScriptedDispatcher(lambda *_: "abcdefgh")
    state = make_state(manifest, dispatcher)
    post(state, "/v1/chat/completions", messages=HELLO)
    assert dispatcher.requests[0].max_tokens == 256 - len(dispatcher.requests[0].prompt)
    for name in ("max_tokens", "max_completion_tokens"):
        reply = post(state, "/v1/chat/completions", messages=HELLO, **{name: 3}).json()
        assert reply["choices"][0]["message"]["content"] == "abc"
        assert reply["choices"][0]["finish_reason"] == "length"
        assert reply["usage"]["completion_tokens"] == 3


def test_logprobs_tell_token_bytes_and_alternatives(manifest: Manifest) -> None:
    dispatcher = ScriptedDispatcher(lambda *_: "é")
    state = make_state(manifest, dispatcher)
    reply = post(state, "/v1/chat/completions", messages=HELLO, logprobs=True, top_logprobs=2).json()
    assert dispatcher.requests[0].sampling[0].logprobs == 2
    content = reply["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9]]
    assert content[0]["logprob"] == -0.5
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -9999.0]
    assert reply["choices"][0]["message"]["content"] == "é"


def test_stop_string_cuts_text_logprobs_and_usage(manifest: Manifest) -> None:
    dispatcher = ScriptedDispatcher(lambda *_: "one END two")
    state = make_state(manifest, dispatcher)
    reply = post(state, "/v1/chat/completions", messages=HELLO, stop="END", logprobs=True).json()
    choice = reply["choices"][0]
    assert choice["message"]["content"] == "one "
    assert choice["finish_reason"] == "stop"
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == "one "
    assert reply["usage"]["completion_tokens"] == len("one END")
    assert dispatcher.stopped == [(0, 0)]


def test_half_a_stop_string_is_given_out_at_the_end(manifest: Manifest) -> None:
    state = make_state(manifest, ScriptedDispatcher(lambda *_: "the EN"))
    reply = post(state, "/v1/chat/completions", messages=HELLO, stop=["END"]).json()
    assert reply["choices"][0]["message"]["content"] == "the EN"


def test_reasoning_is_split_off(thinking_manifest: Manifest) -> None:
    state = make_state(thinking_manifest, ScriptedDispatcher(lambda *_: "hmm</think>yes"))
    reply = post(state, "/v1/chat/completions", messages=HELLO).json()
    message = reply["choices"][0]["message"]
    assert message["content"] == "yes"
    assert message["reasoning_content"] == message["reasoning"] == "hmm"
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == len("hmm")


def test_streamed_chunks_add_up_to_the_whole_answer(manifest: Manifest) -> None:
    state = make_state(manifest, ScriptedDispatcher(lambda request, choice: f'{choice}: "ü€" \n'))
    whole = post(state, "/v1/chat/completions", messages=HELLO, n=2).json()
    fields = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(post(state, "/v1/chat/completions", messages=HELLO, n=2, **fields))
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"] and chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(choice["delta"].get("content", "") for choice in mine)
        assert text == whole["choices"][index]["message"]["content"]
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]
        assert mine[-1]["delta"] == {}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)


def test_usage_is_left_out_of_a_stream_that_did_not_ask(manifest: Manifest) -> None:
    state = make_state(manifest, ScriptedDispatcher(lambda *_: "hi"))
    chunks = events(post(state, "/v1/chat/completions", messages=HELLO, stream=True))
    assert all("usage" not in chunk for chunk in chunks)


def test_streamed_reasoning_and_logprobs(thinking_manifest: Manifest) -> None:
    state = make_state(thinking_manifest, ScriptedDispatcher(lambda *_: "hmm</think>yes"))
    chunks = events(post(state, "/v1/chat/completions", messages=HELLO, stream=True, logprobs=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "yes"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hmm"
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "hmm"
    logged = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    tokens = [entry["token"] for each in logged if each for entry in each["content"]]
    assert "".join(tokens) == "hmm</think>yes"


def test_stop_token_is_counted_and_not_printed(manifest: Manifest) -> None:
    dispatcher = ScriptedDispatcher(lambda *_: "abc")
    state = make_state(manifest, dispatcher)
    reply = post(state, "/v1/chat/completions", messages=HELLO, stop_token_ids=[ord("b")], ignore_eos=True).json()
    assert reply["choices"][0]["message"]["content"] == "a"
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == 2
    assert IM_END not in dispatcher.requests[0].sampling[0].stop_token_ids


def test_model_without_template_points_to_completions(untemplated_manifest: Manifest) -> None:
    reply = post(make_state(untemplated_manifest, ScriptedDispatcher()), "/v1/chat/completions", messages=HELLO)
    assert reply.status_code == 400
    assert "/v1/completions" in json.loads(reply.text)["error"]["message"]
