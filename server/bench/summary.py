"""What the outcomes of a run say: percentiles, rates, goodput, failures, and whether the client was the limit."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from server.bench.wire import Health, Outcome

P99_FROM = 500
"""Fewer requests give no p99: it would rest on less than five of them."""
LATE_SECONDS = 0.01
"""Requests sent this late, or an event loop that lags so much, distort what is measured in milliseconds."""
BUSY_SHARE = 0.8


def quantile(values: Sequence[float], share: float) -> float:
    """By linear interpolation between the nearest ranks. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values, no quantile")
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


class Quantiles(msgspec.Struct, frozen=True):
    """Seconds; None where too few requests stand behind it."""

    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        if not values:
            return cls(None, None, None)
        return cls(
            quantile(values, 0.5), quantile(values, 0.9), quantile(values, 0.99) if len(values) >= P99_FROM else None
        )

    @classmethod
    def median(cls, all_of: Sequence[Quantiles]) -> Quantiles:
        """Of each percentile over several runs; None where one of them has none."""

        def middle(values: list[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return statistics.median(known) if known and len(known) == len(values) else None

        columns = ([each.p50 for each in all_of], [each.p90 for each in all_of], [each.p99 for each in all_of])
        return cls(*map(middle, columns))


METRICS: dict[str, Callable[[Outcome], float]] = {
    "ttft": lambda outcome: outcome.first - outcome.due,
    "tpot": lambda outcome: (outcome.last - outcome.first) / (outcome.tokens - 1),
    "gap": lambda outcome: outcome.longest_gap,
    "e2e": lambda outcome: outcome.ended - outcome.due,
}
"""Seconds of a complete answer: time to first token, mean time of each later one, longest pause between two events
with tokens, time to the end. ``tpot`` and ``gap`` are of answers of two tokens and more."""
_NEED_TWO_TOKENS = ("tpot", "gap")


def values_of(metric: str, outcomes: Sequence[Outcome]) -> list[float]:
    """Of complete answers, where the metric is defined."""
    measure, least = METRICS[metric], 2 if metric in _NEED_TWO_TOKENS else 1
    return [measure(outcome) for outcome in outcomes if not outcome.error and outcome.tokens >= least]


class ClientHealth(msgspec.Struct, frozen=True):
    """The worst of all client processes. Times in seconds."""

    late_p99: float | None
    """How much later than due requests were sent; None in a closed loop, where none is ever due."""
    loop_lag_p99: float
    cpu_share: float
    limits: list[str]
    """In what respects the client was itself the limit; empty is good."""

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], healths: Sequence[Health], open_loop: bool) -> ClientHealth:
        late = quantile([each.sent - each.due for each in outcomes], 0.99) if open_loop and outcomes else None
        lag = max((each.loop_lag_p99 for each in healths), default=0.0)
        cpu = max((each.cpu_share for each in healths), default=0.0)
        limits = []
        if late is not None and late > LATE_SECONDS:
            limits.append(f"1 % of the requests were sent more than {late * 1000:.0f} ms late")
        if lag > LATE_SECONDS:
            limits.append(f"a client's event loop lagged {lag * 1000:.0f} ms at p99")
        if cpu > BUSY_SHARE:
            limits.append(f"a client process kept {cpu:.0%} of a core busy")
        return cls(late, lag, cpu, limits)


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run with one seed. Times in seconds."""

    seed: int
    requests: int
    """That ended, well or not."""
    complete: int
    refused: dict[str, int]
    """Answers 429 and 503: the server shed load."""
    errors: dict[str, int]
    """Other failures by kind, each with how many."""
    seconds: float
    """From the first request's time to the last one's end."""
    requests_per_second: float
    """Complete ones."""
    input_tokens_per_second: float
    output_tokens_per_second: float
    tokens_per_event: float
    """Output tokens over events with tokens; a server that waits before it writes has more than one."""
    uncounted: int
    """Complete answers whose tokens are our count of events, because the server told none."""
    metrics: dict[str, Quantiles]
    """By the names of ``METRICS``."""
    good: int
    """Requests that met all targets; a request that failed is a miss. All complete ones where there is no target."""
    goodput: float
    """Good requests per second."""
    client: ClientHealth
    details: dict[str, str]
    """One text of the server for each kind of failure."""


REFUSALS = ("http 429", "http 503")


def summarize(
    outcomes: Sequence[Outcome], healths: Sequence[Health], *, seed: int, slo: dict[str, float], open_loop: bool
) -> Summary:
    """``slo``: most seconds by the names of ``METRICS``. Raises ValueError for no outcomes."""
    if not outcomes:
        raise ValueError("no request has ended")
    complete = [outcome for outcome in outcomes if not outcome.error]
    kinds = Counter(outcome.error for outcome in outcomes if outcome.error)
    seconds = max(outcome.ended for outcome in outcomes) - min(outcome.due for outcome in outcomes)
    tokens = sum(outcome.tokens for outcome in complete)
    good = sum(meets(outcome, slo) for outcome in complete)
    return Summary(
        seed=seed,
        requests=len(outcomes),
        complete=len(complete),
        refused={kind: count for kind, count in kinds.items() if kind in REFUSALS},
        errors={kind: count for kind, count in kinds.items() if kind not in REFUSALS},
        seconds=seconds,
        requests_per_second=len(complete) / seconds,
        input_tokens_per_second=sum(outcome.input_tokens for outcome in complete) / seconds,
        output_tokens_per_second=tokens / seconds,
        tokens_per_event=tokens / max(1, sum(outcome.events for outcome in complete)),
        uncounted=sum(not outcome.counted for outcome in complete),
        metrics={metric: Quantiles.of(values_of(metric, complete)) for metric in METRICS},
        good=good,
        goodput=good / seconds,
        client=ClientHealth.of(outcomes, healths, open_loop),
        details={outcome.error: outcome.detail for outcome in outcomes if outcome.error},
    )


def meets(outcome: Outcome, slo: dict[str, float]) -> bool:
    """A complete answer that stays within every target; one token alone has no ``tpot`` and no ``gap`` to miss."""
    wanted = {metric: most for metric, most in slo.items() if metric not in _NEED_TWO_TOKENS or outcome.tokens >= 2}
    return all(METRICS[metric](outcome) <= most for metric, most in wanted.items())
