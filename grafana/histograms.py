"""Panels of one histogram, as more than one dashboard has them."""

from __future__ import annotations

from grafana.panel import Panel, Query
from grafana.promql import mean, of_model, quantile


def quantiles(title: str, histogram: str, unit: str, text: str = "") -> Panel:
    """And the mean."""
    queries = [Query(quantile(q, histogram), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)]
    return Panel(title=title, queries=(*queries, Query(mean(histogram), "mean")), unit=unit, text=text)


def heatmap(title: str, histogram: str, unit: str, width: int = 8) -> Panel:
    """Of what was observed between two points of time."""
    buckets = f"sum by (le) (increase({of_model(f'{histogram}_bucket')}[$__rate_interval]))"
    return Panel(title=title, kind="heatmap", unit=unit, queries=(Query(buckets, "{{le}}"),), width=width)
