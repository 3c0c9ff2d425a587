"""schemathesis over our OpenAPI document: whatever it says goes in, and nothing but what it says comes out."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.integration.in_process import Running, serving
from tests.unit.api.harness import close_texts, write_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        negative_data_rejection,
        response_schema_conformance,
        status_code_conformance,
    )

KINDS = {"within the schema": 300, "outside": 300, "fitting": 400}
"""Cases for each POST route. The fitting ones are within the schema and changed so that most get an answer."""
VOCAB = 256
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(write_model(tmp_path_factory.mktemp("tiny"))) as server:
        yield server
    close_texts()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_no_case_breaks_the_server(running: Running, path: str, kind: str) -> None:
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    mode = GenerationMode.NEGATIVE if kind == "outside" else GenerationMode.POSITIVE
    checks = [*CHECKS, negative_data_rejection] if kind == "outside" else CHECKS
    statuses: Counter[int] = Counter()

    @given(case=schema[path]["POST"].as_strategy(generation_mode=mode))
    @settings(max_examples=KINDS[kind], deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def check(case: schemathesis.Case) -> None:
        if kind == "fitting":
            case.body = fit(case.body)
        response = case.call(base_url=running.url, timeout=30)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=checks)

    check()
    assert sum(statuses.values()) >= KINDS[kind]
    # 503 and 504: a target or a timeout so short that it must be missed.
    assert set(statuses) <= {200, 400, 404, 405, 413, 503, 504}, statuses
    if kind == "fitting":
        assert statuses[200] > KINDS[kind] // 2, statuses
    assert running.blocks_used() == 0
    assert running.dispatcher.scheduler.integrity() == []


def fit(body: dict[str, Any]) -> dict[str, Any]:
    """The same case with its numbers brought into the model's vocabulary and context, and contradictions taken out."""
    dropped = {"max_completion_tokens", "best_of", "chat_template_kwargs"}
    if not body.get("stream"):
        dropped.add("stream_options")
    if not body.get("logprobs"):
        dropped.add("top_logprobs")
    if body.get("messages"):
        dropped.add("prompt")
    return {name: _FIT.get(name, _as_it_is)(value) for name, value in body.items() if name not in dropped}


def _as_it_is(value: Any) -> Any:
    return value


def _fit_ids(value: Any) -> Any:
    if isinstance(value, list):
        return [_fit_ids(each) for each in value]
    return value % VOCAB if isinstance(value, int | float) else value


def _fit_bias(value: dict[str, float] | None) -> dict[str, float]:
    return {str(int(token) % VOCAB): bias for token, bias in (value or {}).items()}


def _fit_messages(value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    return value and [message | {"content": message.get("content") or "x"} for message in value]


_FIT: dict[str, Callable[[Any], Any]] = {
    "max_tokens": lambda value: value and 20 + value % 20,
    "min_tokens": lambda value: value and value % 16,
    "prompt": lambda value: _fit_ids(value) or "x",
    "tokens": _fit_ids,
    "stop_token_ids": _fit_ids,
    "logit_bias": _fit_bias,
    "messages": _fit_messages,
}
