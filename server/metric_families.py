"""The families of the table, registered: what counts is looked up here by the table's names."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from server.metric_table import TABLE, Metric

disable_created_metrics()  # type: ignore[no-untyped-call]


class TokenGaps(Collector):
    """The histogram that every token passes: a tenth of what the library's own costs per observation."""

    NAME = "inter_token_seconds"

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text = name, text
        self._bounds = tuple(bounds)
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, model: str, gaps: Mapping[float, int]) -> None:
        """How often each gap in seconds came: most choices of a step have the same."""
        counts = self._counts.setdefault(model, [0] * (len(self._bounds) + 1))
        total = 0.0
        for gap, times in gaps.items():
            counts[bisect_left(self._bounds, gap)] += times
            total += gap * times
        self._sums[model] = self._sums.get(model, 0.0) + total

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """As the library's own metrics do."""
        family = HistogramMetricFamily(self._name, self._text, labels=("model",))
        edges = [*map(floatToGoString, self._bounds), "+Inf"]
        for model, counts in self._counts.items():
            buckets = list(zip(edges, map(float, accumulate(counts)), strict=True))
            family.add_metric((model,), buckets, self._sums[model])
        yield family


class Families:
    """All of the table. KeyError for a name that the table does not have."""

    def __init__(self) -> None:
        self.counters: dict[str, Counter] = {}
        self.gauges: dict[str, Gauge] = {}
        self.histograms: dict[str, Histogram] = {}
        self.gaps: TokenGaps
        for metric in TABLE:
            self._register(metric)

    def _register(self, metric: Metric) -> None:
        name, text, labels = f"slimserve_{metric.name}", metric.help, metric.labels
        match metric.kind:
            case "counter":
                self.counters[metric.name] = Counter(name, text, labels, registry=None)
            case "gauge":
                self.gauges[metric.name] = Gauge(name, text, labels, registry=None)
            case "histogram" if metric.name == TokenGaps.NAME:
                self.gaps = TokenGaps(name, text, metric.buckets)
            case "histogram":
                self.histograms[metric.name] = Histogram(name, text, labels, registry=None, buckets=metric.buckets)

    def show_at_zero(self, model: str) -> None:
        """A series that exists from the start: rates over its first increase are right."""
        for metric in TABLE:
            if metric.name == TokenGaps.NAME:
                self.gaps.observe(model, {})
            elif metric.labels == ("model",) and metric.at_zero:
                (self.counters | self.gauges | self.histograms)[metric.name].labels(model)

    def parts(self) -> Iterator[bytes]:
        """The text that Prometheus reads, a family at a time: each is rendered when it is asked for."""
        for family in (*self.counters.values(), *self.gauges.values(), *self.histograms.values(), self.gaps):
            yield generate_latest(family)

    def render(self) -> bytes:
        """All of it."""
        return b"".join(self.parts())
