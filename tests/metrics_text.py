"""Read values out of a ``/metrics`` page, and wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
from prometheus_client.parser import text_string_to_metric_families


def metric(url: str, name: str, **labels: str) -> float:
    """``value`` of the page that a server gives."""
    return value(httpx.get(f"{url}/metrics", timeout=10).raise_for_status().text, name, **labels)


def value(page: str, name: str, **labels: str) -> float:
    """Sum of all samples of this name whose labels include the given ones. Raises KeyError where there is none."""
    values = [
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    if not values:
        raise KeyError(f"{name} {labels}")
    return sum(values)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Raises AssertionError where it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


def wait_until_zero(url: str, *gauges: str) -> None:
    """The worker reports its gauges twice a second."""
    wait_until(lambda: not any(metric(url, gauge) for gauge in gauges))
