from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from engines.engine_folder import Quality
from engines.manifest import Manifest
from server.api.routes import create_api
from server.api.schemas import REQUEST_BODIES, Message
from server.api.state import ModelState, ReadyState
from tests.unit.api.harness import ScriptedDispatcher, call, make_state


def get(manifest: Manifest, path: str, **options: Any) -> Any:
    app = create_api(make_state(manifest, ScriptedDispatcher(), **options))
    return call(app, ("GET", path, None))[0]


def test_models_are_listed_and_found(manifest: Manifest) -> None:
    names = ("tiny", "org/big")
    reply = get(manifest, "/v1/models", names=names).json()
    assert reply["object"] == "list"
    assert [card["id"] for card in reply["data"]] == list(names)
    card = get(manifest, "/v1/models/org/big", names=names).json()
    assert card == {
        "id": "org/big",
        "created": 1700000000,
        "max_model_len": 256,
        "object": "model",
        "owned_by": "slimserve",
    }


def test_a_model_with_a_card_tells_its_quality(manifest: Manifest) -> None:
    state = make_state(manifest, ScriptedDispatcher())
    quality = Quality(perplexity_ratio=1.02, kl=0.01, measured_on="wikitext-2")
    state.models = {name: replace(model, quality=quality) for name, model in state.language_models.items()}
    one, all_of_them = call(create_api(state), ("GET", "/v1/models/tiny", None), ("GET", "/v1/models", None))
    assert one.json()["quality"] == msgspec.to_builtins(quality)
    assert all_of_them.json()["data"] == [one.json()]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_unknown_model_is_404(manifest: Manifest, path: str) -> None:
    body: dict[str, Any] = {"model": "adapter"}
    body |= {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {}
    body |= {"tokens": [1]} if path == "/detokenize" else {}
    body |= {"prompt": "x"} if "messages" not in body and "tokens" not in body else {}
    app = create_api(make_state(manifest, ScriptedDispatcher()))
    for reply in call(app, ("POST", path, body), ("GET", "/v1/models/adapter", None)):
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "model_not_found"
        assert "adapter" in reply.json()["error"]["message"]


def test_unknown_route_and_wrong_method_have_the_same_shape(manifest: Manifest) -> None:
    app = create_api(make_state(manifest, ScriptedDispatcher()))
    missing, wrong, slash = call(
        app, ("GET", "/v1/nothing", None), ("GET", "/v1/completions", None), ("GET", "/v1/models/", None)
    )
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "unknown_route"
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    assert slash.status_code == 404
    assert slash.json()["error"].keys() == {"message", "type", "param", "code"}


def test_tokenize_and_detokenize_are_inverse(manifest: Manifest) -> None:
    app = create_api(make_state(manifest, ScriptedDispatcher()))
    text = "naïve 你好 <|im_end|>"
    reply = call(app, ("POST", "/tokenize", {"prompt": text, "return_token_strs": True}))[0].json()
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    assert reply["max_model_len"] == 256
    assert reply["tokens"][:2] == [ord("n"), ord("a")]
    short = call(app, ("POST", "/tokenize", {"model": "tiny", "prompt": "naïve 你好"}))[0].json()
    assert short["token_strs"] is None
    back = call(app, ("POST", "/detokenize", {"tokens": short["tokens"]}))[0].json()
    assert back == {"prompt": "naïve 你好"}


def test_tokenize_renders_messages(manifest: Manifest) -> None:
    state = make_state(manifest, ScriptedDispatcher())
    body = {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False}
    reply = call(create_api(state), ("POST", "/tokenize", body))[0].json()
    assert reply["tokens"] == state.language_models["tiny"].text.encode("<|im_start|>user\nx<|im_end|>\n", False)


def test_a_name_is_needed_among_several_models(manifest: Manifest) -> None:
    app = create_api(make_state(manifest, ScriptedDispatcher(), names=("a", "b")))
    reply = call(app, ("POST", "/tokenize", {"prompt": "x"}))[0]
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "model"


@pytest.mark.parametrize("body", [{"prompt": "x", "messages": [{"role": "user", "content": "y"}]}, {}])
def test_tokenize_takes_one_of_two(manifest: Manifest, body: dict[str, Any]) -> None:
    app = create_api(make_state(manifest, ScriptedDispatcher()))
    assert call(app, ("POST", "/tokenize", body))[0].status_code == 400


def test_detokenize_refuses_ids_outside_the_vocabulary(manifest: Manifest) -> None:
    app = create_api(make_state(manifest, ScriptedDispatcher()))
    reply = call(app, ("POST", "/detokenize", {"tokens": [1, 261]}))[0]
    assert reply.status_code == 400
    assert "261" in reply.json()["error"]["message"]


def test_health_follows_the_state(manifest: Manifest) -> None:
    loading = ModelState(name="tiny", state="loading", phase="read", done=5, total=10)
    assert get(manifest, "/health/live").status_code == 200
    assert get(manifest, "/health/ready").json()["status"] == "ready"
    reply = get(manifest, "/health/ready", ready=lambda: ReadyState(True, False, (loading,)))
    assert reply.status_code == 503
    assert reply.json() == {
        "status": "not ready",
        "models": [{"name": "tiny", "state": "loading", "phase": "read", "done": 5, "total": 10, "reason": ""}],
    }
    assert get(manifest, "/health/live", ready=lambda: ReadyState(False, False)).status_code == 503


def test_version_and_metrics(manifest: Manifest) -> None:
    assert get(manifest, "/version").json() == {"version": "1.2.3"}
    reply = get(manifest, "/metrics")
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "slimserve_" in reply.text


def test_no_answer_invites_another_origin(manifest: Manifest) -> None:
    reply = get(manifest, "/v1/models")
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_openapi_names_every_field_with_type_and_bounds(manifest: Manifest) -> None:
    schema = get(manifest, "/openapi.json").json()
    components = schema["components"]["schemas"]
    for body in (*REQUEST_BODIES, Message):
        assert components[body.__name__]["additionalProperties"] is False
        assert components[body.__name__]["properties"].keys() == body.model_fields.keys()
    for field, limits in {"temperature": {"minimum": 0, "maximum": 2}, "n": {"minimum": 1, "maximum": 128}}.items():
        number = components["ChatBody"]["properties"][field]["anyOf"][0]
        assert limits.items() <= number.items()
    assert components["ChatBody"]["properties"]["model"]["enum"] == ["tiny"]
    posts = [path for path, item in schema["paths"].items() if "post" in item]
    infer = [f"/v2/models/{{model_name}}{version}/infer" for version in ("", "/versions/{version}")]
    texts = ["/detokenize", "/tokenize", "/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    assert sorted(posts) == [*texts, *infer]
    for path in posts:
        assert {"200", "400", "401", "404", "413", "503"} <= schema["paths"][path]["post"]["responses"].keys()


def test_openapi_references_resolve(manifest: Manifest) -> None:
    schema = get(manifest, "/openapi.json").json()
    found = references(schema)
    assert len(found) > 10
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in schema["components"]["schemas"]


def test_openapi_follows_a_reload_of_the_models(manifest: Manifest) -> None:
    state = make_state(manifest, ScriptedDispatcher(), names=("a", "b"))
    app = create_api(state)
    ask = ("GET", "/openapi.json", None)
    for models, required, optional in (({"a", "b"}, ["a", "b"], ["a", "b", None]), ({"b"}, ["b"], ["b", None])):
        state.models = {name: model for name, model in state.models.items() if name in models}
        bodies = call(app, ask)[0].json()["components"]["schemas"]
        assert bodies["ChatBody"]["properties"]["model"]["enum"] == required
        assert bodies["TokenizeBody"]["properties"]["model"]["enum"] == optional
    assert app.openapi() is app.openapi(), "it is built again only where something has changed"


def references(part: Any) -> set[str]:
    if isinstance(part, dict):
        own = {part["$ref"]} if isinstance(part.get("$ref"), str) else set()
        return own.union(*map(references, part.values()))
    return set().union(*map(references, part)) if isinstance(part, list) else set()
