"""A short run of ``python -m tests.fuzz_api``: a live server, with and without keys."""

from __future__ import annotations

from pathlib import Path

from server.web.page import PATHS as PAGE
from tests.fuzz_api import fuzz_all
from tests.integration.test_routes_table import table

EXAMPLES = 10
"""For each operation and kind of case."""


def test_a_live_server_with_and_without_keys(tmp_path: Path) -> None:
    outcomes = fuzz_all(tmp_path, EXAMPLES)
    assert not [fault for outcome in outcomes for fault in outcome.faults]
    # The description leaves out itself and the files of the web page.
    left_out = {row.path for row in table() if row.path in PAGE} | {"/openapi.json"}
    described = {f"{row.method} {row.path.replace(':path', '')}" for row in table() if row.path not in left_out}
    for outcome in outcomes:
        assert {*outcome.statuses} == described
        assert outcome.cases >= 4 * 3 * EXAMPLES
    closed = [counter for name, counter in outcomes[-1].statuses.items() if "/health/" not in name]
    assert sum(counter[401] for counter in closed) > 0.9 * sum(counter.total() for counter in closed)
