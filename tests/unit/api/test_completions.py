from __future__ import annotations

from engines.manifest import Manifest
from server.api.state import ApiState
from tests.unit.api.harness import ScriptedDispatcher, events, make_state, post


def answering(manifest: Manifest, answer: str = "xy") -> ApiState:
    return make_state(manifest, ScriptedDispatcher(lambda *_: answer))


def test_shape_and_default_limit(manifest: Manifest) -> None:
    dispatcher = ScriptedDispatcher(lambda *_: "z" * 50)
    reply = post(make_state(manifest, dispatcher), "/v1/completions", prompt="abc").json()
    assert reply.pop("id").startswith("cmpl-")
    assert reply["object"] == "text_completion"
    assert reply["choices"] == [{"index": 0, "text": "z" * 16, "logprobs": None, "finish_reason": "length"}]
    assert reply["usage"]["prompt_tokens"] == 3
    assert reply["usage"]["completion_tokens"] == 16


def test_default_limit_shrinks_to_what_the_context_leaves(manifest: Manifest) -> None:
    dispatcher = ScriptedDispatcher(lambda *_: "z" * 50)
    post(make_state(manifest, dispatcher), "/v1/completions", prompt="a" * 250)
    assert dispatcher.requests[0].max_tokens == 6


def test_prompts_as_text_or_ids_alone_or_in_lists(manifest: Manifest) -> None:
    cases = [
        ("ab", [[97, 98]]),
        ([97, 98], [[97, 98]]),
        (["a", "bc"], [[97], [98, 99]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ]
    for prompt, expected in cases:
        dispatcher = ScriptedDispatcher(lambda *_: "ok")
        reply = post(make_state(manifest, dispatcher), "/v1/completions", prompt=prompt).json()
        assert [request.prompt for request in dispatcher.requests] == expected
        assert len(reply["choices"]) == len(expected)
        assert reply["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_choices_are_numbered_over_prompts(manifest: Manifest) -> None:
    dispatcher = ScriptedDispatcher(lambda request, choice: f"{chr(request.prompt[0])}{choice}")
    state = make_state(manifest, dispatcher)
    reply = post(state, "/v1/completions", prompt=["a", "b"], n=2, best_of=2).json()
    assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == [
        (0, "a0"),
        (1, "a1"),
        (2, "b0"),
        (3, "b1"),
    ]
    chunks = events(post(state, "/v1/completions", prompt=["a", "b"], n=2, stream=True))
    texts = ["", "", "", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["a0", "a1", "b0", "b1"]


def test_echo_puts_the_prompt_first(manifest: Manifest) -> None:
    assert post(answering(manifest), "/v1/completions", prompt="ab", echo=True).json()["choices"][0]["text"] == "abxy"
    reply = post(answering(manifest), "/v1/completions", prompt=[97, 98], echo=True, max_tokens=0).json()
    assert reply["choices"][0]["text"] == "ab"
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 0


def test_echo_with_logprobs(manifest: Manifest) -> None:
    reply = post(answering(manifest), "/v1/completions", prompt="aé", echo=True, logprobs=1, max_tokens=2).json()
    table = reply["choices"][0]["logprobs"]
    assert table["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "x", "y"]
    assert table["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert table["top_logprobs"][0] is None
    assert table["top_logprobs"][3] == {"x": -0.5, "\x01": -9999.0}
    assert table["text_offset"] == [0, 1, 1, 2, 3]


def test_streamed_echo_with_logprobs_equals_the_whole(manifest: Manifest) -> None:
    fields = {"prompt": ["ab", "c"], "echo": True, "logprobs": 0, "n": 2}
    whole = post(answering(manifest), "/v1/completions", **fields).json()
    chunks = events(post(answering(manifest), "/v1/completions", stream=True, **fields))
    for choice in whole["choices"]:
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(each["text"] for each in mine) == choice["text"]
        for column, values in choice["logprobs"].items():
            assert [value for each in mine for value in each["logprobs"][column]] == values


def test_streamed_usage(manifest: Manifest) -> None:
    fields = {"prompt": "ab", "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(post(answering(manifest), "/v1/completions", **fields))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_prompt_without_room_for_output_can_only_be_echoed(manifest: Manifest) -> None:
    full = [1] * 256
    assert post(answering(manifest), "/v1/completions", prompt=full, echo=True, max_tokens=0).status_code == 200
    reply = post(answering(manifest), "/v1/completions", prompt=full)
    assert reply.status_code == 400


def test_a_refused_prompt_takes_the_others_with_it(manifest: Manifest) -> None:
    from server.errors import Overloaded

    class SecondRefused(ScriptedDispatcher):
        def submit(self, request):  # type: ignore[no-untyped-def]
            if self.requests:
                self.refusal = Overloaded("full", retry_after=2.5)
            return super().submit(request)

    dispatcher = SecondRefused(lambda *_: "ok")
    state = make_state(manifest, dispatcher)
    for stream in (False, True):
        dispatcher.refusal, dispatcher.requests = None, []
        reply = post(state, "/v1/completions", prompt=["a", "b"], stream=stream)
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "3"
    assert dispatcher.closed == dispatcher.replies
    assert b'slimserve_http_refusals_total{model="tiny",reason="overloaded"} 2.0' in state.metrics.render()
