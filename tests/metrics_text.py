"""Read values out of a ``/metrics`` page."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families


def metric(url: str, name: str, **labels: str) -> float:
    """Sum of all samples of this name whose labels include the given ones. Raises KeyError where there is none."""
    page = httpx.get(f"{url}/metrics", timeout=10).raise_for_status().text
    values = [
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    if not values:
        raise KeyError(f"{name} {labels}")
    return sum(values)
