"""From what a panel shows to the JSON that Grafana reads. Nothing here knows a metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["stat", "timeseries", "heatmap", "table"]
Json = dict[str, Any]

COLUMNS = 24
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
NO_TRAFFIC = {"type": "special", "options": {"match": "null+nan", "result": {"text": "No traffic", "index": 0}}}


@dataclass(frozen=True, slots=True)
class Query:
    expression: str
    """PromQL, with ``$model``, ``$instance`` and ``$__rate_interval`` in it."""
    legend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    queries: Sequence[Query]
    kind: Kind = "timeseries"
    unit: str = "short"
    """One of Grafana's."""
    text: str = ""
    """Shown where the mouse is over the title's mark."""
    width: int = 8
    height: int = 8
    stacked: bool = False
    largest: float | None = None
    limits: tuple[float, float] | None = None
    """From these on a value is yellow, and red."""

    def to_json(self, number: int, x: int, y: int) -> Json:
        """At that place of the grid."""
        panel: Json = {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.text,
            "datasource": SOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "targets": [self._target(index, query) for index, query in enumerate(self.queries)],
            "fieldConfig": {"defaults": self._defaults(), "overrides": []},
            "options": self._options(),
        }
        if self.kind == "table":
            panel["transformations"] = [
                {"id": "merge", "options": {}},
                {"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": self._columns()}},
            ]
        return panel

    def _target(self, index: int, query: Query) -> Json:
        target: Json = {
            "refId": chr(ord("A") + index),
            "datasource": SOURCE,
            "expr": query.expression,
            "legendFormat": query.legend or "__auto",
            "range": self.kind != "table",
            "instant": self.kind == "table",
        }
        if self.kind in ("heatmap", "table"):
            target["format"] = self.kind
        return target

    def _columns(self) -> dict[str, str]:
        return {f"Value #{chr(ord('A') + index)}": query.legend for index, query in enumerate(self.queries)}

    def _defaults(self) -> Json:
        steps: list[Json] = [{"color": "green", "value": None}]
        if self.limits is not None:
            steps += [{"color": color, "value": at} for color, at in zip(("yellow", "red"), self.limits, strict=True)]
        defaults: Json = {
            "unit": self.unit,
            "noValue": "No traffic",
            "mappings": [NO_TRAFFIC],
            "thresholds": {"mode": "absolute", "steps": steps},
            "min": 0,
        }
        if self.largest is not None:
            defaults["max"] = self.largest
        if self.kind == "timeseries":
            defaults["custom"] = {
                "fillOpacity": 30 if self.stacked else 0,
                "stacking": {"mode": "normal" if self.stacked else "none", "group": "A"},
                "showPoints": "never",
                "spanNulls": False,
            }
        return defaults

    def _options(self) -> Json:
        match self.kind:
            case "stat":
                return {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "graphMode": "area"}
            case "timeseries":
                return {
                    "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
                    "tooltip": {"mode": "multi", "sort": "desc"},
                }
            case "heatmap":
                return {
                    "calculate": False,
                    "yAxis": {"unit": self.unit, "axisPlacement": "left"},
                    "color": {"mode": "scheme", "scheme": "Turbo", "steps": 64, "exponent": 0.5},
                    "cellGap": 1,
                }
            case "table":
                return {"showHeader": True, "cellHeight": "sm"}


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Variable:
    """The values of a label of a metric; all of them together are one choice where ``several`` may be chosen."""

    label: str
    metric: str
    several: bool = True

    def to_json(self) -> Json:
        query = f"label_values({self.metric}, {self.label})"
        variable: Json = {
            "name": self.label,
            "type": "query",
            "label": self.label,
            "datasource": SOURCE,
            "query": {"query": query, "refId": f"Variable-{self.label}"},
            "definition": query,
            "refresh": 2,
            "sort": 1,
            "multi": self.several,
            "includeAll": self.several,
            "options": [],
        }
        if self.several:
            variable |= {"allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}}
        return variable


@dataclass(frozen=True, slots=True)
class Dashboard:
    uid: str
    title: str
    text: str
    rows: Sequence[Row]
    variables: Sequence[Variable] = field(default_factory=tuple)

    @property
    def panels(self) -> list[Panel]:
        return [panel for row in self.rows for panel in row.panels]

    def to_json(self) -> Json:
        """As Grafana's file provisioning takes it."""
        source = {"name": "datasource", "type": "datasource", "label": "Prometheus", "query": "prometheus"}
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.text,
            "tags": ["slimserve"],
            "schemaVersion": 39,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "10s",
            "time": {"from": "now-30m", "to": "now"},
            "timezone": "browser",
            "annotations": {"list": []},
            "links": [
                {"type": "dashboards", "title": "Slimserve", "tags": ["slimserve"], "asDropdown": True, "url": ""}
            ],
            "templating": {"list": [source | {"refresh": 1}, *(each.to_json() for each in self.variables)]},
            "panels": self._placed(),
        }

    def _placed(self) -> list[Json]:
        """Rows below each other; in a row panels side by side, and below where the width is used up."""
        placed: list[Json] = []
        y = 0
        for row in self.rows:
            place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
            placed.append(
                {
                    "id": len(placed) + 1,
                    "type": "row",
                    "title": row.title,
                    "collapsed": False,
                    "gridPos": place,
                    "panels": [],
                }
            )
            x, y, height = 0, y + 1, 0
            for panel in row.panels:
                if x + panel.width > COLUMNS:
                    x, y, height = 0, y + height, 0
                placed.append(panel.to_json(len(placed) + 1, x, y))
                x, height = x + panel.width, max(height, panel.height)
            y += height
        return placed
