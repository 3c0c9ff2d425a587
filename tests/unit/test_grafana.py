"""Dashboards and alert rules against the table of metrics, Grafana's own types and a PromQL parser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard as TypedDashboard

from grafana.build import DASHBOARDS, FOLDER, render
from grafana.panel import COLUMNS
from grafana.queries import filled
from server.metric_table import TABLE
from tests.promtool import needs_promtool, promtool

ROOT = Path(__file__).resolve().parents[2]
ALERTS = ROOT / "grafana" / "alerts"
OF_PROMETHEUS = {"up"}


def series_of_the_table() -> dict[str, set[str]]:
    """Names of all series that the table can give, and their labels."""
    found: dict[str, set[str]] = {}
    for metric in TABLE:
        endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[metric.kind]
        for ending in endings:
            labels = {*metric.labels, "instance", "job"} | ({"le"} if ending == "_bucket" else set())
            found[f"slimserve_{metric.name}{ending}"] = labels
    return found


SERIES = series_of_the_table()


def selectors(expression: str) -> list[tuple[str, set[str]]]:
    """Each metric of an expression, with the labels that it is matched by. Raises ValueError for a wrong one."""
    found: list[tuple[str, set[str]]] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name or "", {matcher.name for matcher in node.matchers.matchers}))

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def check(expression: str) -> None:
    found = selectors(expression)
    assert found, expression
    for name, labels in found:
        assert name in SERIES or name in OF_PROMETHEUS, f"{name} is in no table"
        assert name in OF_PROMETHEUS or labels <= SERIES[name], f"{name} has no label {labels - SERIES[name]}"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_files_are_what_the_panels_say(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text() == render(name), "run python -m grafana.build"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_query_parses_and_names_what_there_is(name: str) -> None:
    expressions = [query.expression for panel in DASHBOARDS[name].panels for query in panel.queries]
    assert len(expressions) > 30
    for expression in expressions:
        check(filled(expression))


def test_a_query_of_an_unknown_metric_or_label_would_be_found() -> None:
    with pytest.raises(AssertionError, match="slimserve_nothing_total is in no table"):
        check("sum(rate(slimserve_nothing_total[5m])) / 2")
    with pytest.raises(AssertionError, match="tenant"):
        check('histogram_quantile(0.5, sum by (le) (rate(slimserve_step_seconds_bucket{tenant="a"}[5m])))')
    with pytest.raises(ValueError, match="unclosed left"):
        check("sum(rate(slimserve_requests_total)")


@pytest.mark.parametrize("name", DASHBOARDS)
def test_grafana_s_types_take_every_field(name: str) -> None:
    """What a type does not know is dropped, so that it would be missing in what it writes."""
    document = json.loads(render(name))
    typed = TypedDashboard.from_json(document)
    again = json.loads(JSONEncoder(sort_keys=True).encode(typed))
    assert [panel["title"] for panel in again["panels"]] == [panel["title"] for panel in document["panels"]]
    missing = {key for key in document if key not in again}
    assert not missing
    for before, after in zip(document["panels"], again["panels"], strict=True):
        assert before.keys() <= after.keys(), before["title"]
        assert before.get("gridPos") == {key: after["gridPos"][key] for key in ("x", "y", "w", "h")}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_do_not_overlap_and_have_numbers_of_their_own(name: str) -> None:
    panels = json.loads(render(name))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells


def test_every_panel_says_no_traffic_and_follows_the_variables() -> None:
    for name, dashboard in DASHBOARDS.items():
        for panel in json.loads(render(name))["panels"]:
            if panel["type"] != "row":
                assert panel["fieldConfig"]["defaults"]["noValue"] == "No traffic"
        for query in (query for panel in dashboard.panels for query in panel.queries):
            assert '"$instance"' in query.expression, query.expression


# --- alerts

RULES = [rule for group in yaml.safe_load((ALERTS / "slimserve.yaml").read_text())["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_every_alert_names_what_there_is_and_says_what_to_do(rule: dict[str, Any]) -> None:
    check(rule["expr"])
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"].keys() == {"summary", "action"}
    tests = (ALERTS / "rules_test.yaml").read_text()
    assert len(re.findall(rf"alertname: {rule['alert']}\b", tests)) >= 1
    assert rule["alert"] in (ROOT / "docs" / "operations.md").read_text()


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    answer = promtool("test", "rules", str(ALERTS / "rules_test.yaml"))
    assert answer.returncode == 0, answer.stdout + answer.stderr


# --- the operator's page


def test_the_operator_s_page_names_all_metrics_and_no_others() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    named = set(re.findall(r"slimserve_[a-z0-9_]+", page))
    names = {f"slimserve_{metric.name}" + ("_total" if metric.kind == "counter" else "") for metric in TABLE}
    assert names - named == set()
    assert named - names - SERIES.keys() == set()
