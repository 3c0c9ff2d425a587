"""Figures out of a server's ``/metrics`` page."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True, slots=True)
class Page:
    """All series at one moment."""

    families: tuple[Metric, ...]

    def value(self, name: str, **labels: str) -> float:
        """Sum of the series of this name (less ``slimserve_``) that have these labels; 0 where there is none yet."""
        return sum(
            sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == f"slimserve_{name}" and labels.items() <= sample.labels.items()
        )

    def buckets(self, name: str) -> dict[float, float]:
        """Of a histogram without labels: how many observations are at most each bound."""
        return {
            float(sample.labels["le"]): sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == f"slimserve_{name}_bucket"
        }


def parse(text: str) -> Page:
    return Page(tuple(text_string_to_metric_families(text)))


async def read_page(port: int, key: str | None = None) -> Page:
    """Of the server on this port of this machine. Raises httpx.HTTPError."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(timeout=10) as client:
        response = await client.get(f"http://127.0.0.1:{port}/metrics", headers=headers)
    return parse(response.raise_for_status().text)
