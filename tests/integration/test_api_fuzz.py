"""schemathesis over our OpenAPI document: whatever it says goes in, and nothing but what it says comes out."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator

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

CASES = 1000
"""Of each POST route, one half of them within the schema and one half outside."""
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


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_no_case_breaks_the_server(running: Running, path: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    checks = [*CHECKS, negative_data_rejection] if mode is GenerationMode.NEGATIVE else CHECKS
    statuses: Counter[int] = Counter()

    @given(case=schema[path]["POST"].as_strategy(generation_mode=mode))
    @settings(max_examples=CASES // 2, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def check(case: schemathesis.Case) -> None:
        response = case.call(base_url=running.url, timeout=30)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=checks)

    check()
    assert sum(statuses.values()) >= CASES // 2
    assert set(statuses) <= {200, 400, 404, 405, 413}, statuses
    if mode is GenerationMode.POSITIVE:
        assert statuses[200] > 0, statuses
    assert running.blocks_used() == 0
    assert running.dispatcher.scheduler.integrity() == []
