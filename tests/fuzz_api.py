"""schemathesis against ``slimserve serve`` in a process of its own, with and without keys.

    python -m tests.fuzz_api --examples 200

Every operation of the server's own OpenAPI document gets cases within its schema and outside: of a server without keys,
of one with keys that bring the API key, and of the same one that bring none. Wanted: no status of 500 or above but 503
and 504 where a target or a timeout cannot be met, only documented answers, and without a key 401 from all that
docs/operations.md does not call open. ``tests/integration/test_live_fuzz.py`` runs a short one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from hypothesis import HealthCheck, Phase, given, settings

from server.api.middleware import OPEN_PATHS
from server.web.page import PATHS as PAGE
from tests.integration.fake_server import FakeServer, configuration, fake_server
from tests.integration.test_api_fuzz import fit

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

API_KEY = "the-key-of-all-requests"
ADMIN_KEY = "the-key-of-the-operator"
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
LATE = frozenset({503, 504})
"""A case may ask for a first token within a millisecond."""
OPEN = OPEN_PATHS | PAGE
KINDS = ("within the schema", "fitting", "outside")
"""Of cases. Fitting ones are within the schema and changed so that most get an answer. A route without a body has the
first kind alone: all paths are within its schema."""
TIMEOUT = 60.0


@dataclass
class Outcome:
    """What one caller got."""

    caller: str
    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    """By operation."""
    faults: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return sum(counter.total() for counter in self.statuses.values())

    def lines(self) -> Iterator[str]:
        for operation, counter in self.statuses.items():
            counts = ", ".join(f"{count} x {status}" for status, count in sorted(counter.items()))
            yield f"{self.caller}: {operation}: {counts}"
        for fault in self.faults:
            yield f"FAILED: {self.caller}: {fault}"


@contextmanager
def server(folder: Path, *, keys: bool) -> Iterator[FakeServer]:
    """A real server whose engine computes nothing, so that a case takes a millisecond."""
    environment = {"SLIMSERVE_API_KEY": API_KEY, "SLIMSERVE_ADMIN_KEY": ADMIN_KEY} if keys else {}
    with fake_server(folder, configuration("fake", max_model_len=256), environment=environment) as running:
        yield running


def fuzz(running: FakeServer, caller: str, key: str | None, examples: int, *, locked: bool) -> Outcome:
    """All operations, with ``key``. With ``locked`` the server has keys: a request that brings none must be refused."""
    outcome = Outcome(caller)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    document = httpx.get(f"{running.url}/openapi.json", headers=_with_key(locked), timeout=TIMEOUT).json()
    schema = schemathesis.openapi.from_dict(document)
    for result in schema.get_all_operations():
        operation = result.ok()
        name = f"{operation.method.upper()} {operation.path}"
        counter = outcome.statuses[name] = Counter()
        refused = locked and key is None and operation.path not in OPEN_PATHS
        for kind in KINDS if operation.body else KINDS[:1]:
            _try(running, operation, kind, headers, examples, counter, outcome, refused=refused)
    if not running.ready():
        outcome.faults.append("the server is not ready any more: " + running.log[-2000:])
    return outcome


def _try(
    running: FakeServer,
    operation: schemathesis.APIOperation,
    kind: str,
    headers: dict[str, str],
    examples: int,
    counter: Counter[int],
    outcome: Outcome,
    *,
    refused: bool,
) -> None:
    mode = GenerationMode.NEGATIVE if kind == "outside" else GenerationMode.POSITIVE
    checks = [*CHECKS, negative_data_rejection] if kind == "outside" else CHECKS

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        if kind == "fitting":
            case.body = fit(case.body)
        case.headers = {k: v for k, v in (case.headers or {}).items() if k.lower() != "authorization"} | headers
        response = case.call(base_url=running.url, timeout=TIMEOUT)
        counter[response.status_code] += 1
        # A path parameter of dots leads to another route, which the client itself makes of it.
        if refused and response.status_code != 401 and httpx.URL(response.request.url).path not in OPEN:
            raise AssertionError(f"{response.status_code} without a key")
        if response.status_code not in LATE:
            case.validate_response(response, checks=checks)

    try:
        check()
    except Exception as error:  # noqa: BLE001  # whatever it is, it is what this program looks for
        outcome.faults.append(f"{operation.method.upper()} {operation.path}: {error}"[:2000])


def fuzz_all(folder: Path, examples: int) -> list[Outcome]:
    """Both servers and all three callers; ``examples`` for each operation and mode."""
    without, locked = folder / "open", folder / "locked"
    without.mkdir()
    locked.mkdir()
    with server(without, keys=False) as running:
        outcomes = [fuzz(running, "no key set", None, examples, locked=False)]
    with server(locked, keys=True) as running:
        outcomes.append(fuzz(running, "API key", API_KEY, examples, locked=True))
        outcomes.append(fuzz(running, "no key sent", None, examples, locked=True))
    return outcomes


def _with_key(locked: bool) -> dict[str, str]:
    return {"authorization": f"Bearer {API_KEY}"} if locked else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--examples", type=int, default=200, help="for each operation, within its schema and outside")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        outcomes = fuzz_all(Path(name), arguments.examples)
    for line in (line for outcome in outcomes for line in outcome.lines()):
        print(line)  # noqa: T201
    print(sum(outcome.cases for outcome in outcomes), "cases")  # noqa: T201
    sys.exit(any(outcome.faults for outcome in outcomes))


if __name__ == "__main__":
    main()
