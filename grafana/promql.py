"""The queries that panels are made of, over the models and instances that the dashboard's variables choose."""

from __future__ import annotations

INSTANCE = 'instance=~"$instance"'
MODEL = f'model=~"$model",{INSTANCE}'


def of_model(metric: str, extra: str = "") -> str:
    """Series of the chosen models; ``extra`` are further matchers."""
    return f"slimserve_{metric}{{{MODEL}{',' if extra else ''}{extra}}}"


def of_instance(metric: str, extra: str = "") -> str:
    """Series that have no model."""
    return f"slimserve_{metric}{{{INSTANCE}{',' if extra else ''}{extra}}}"


def rate(series: str) -> str:
    return f"rate({series}[$__rate_interval])"


def total(vector: str, by: str = "") -> str:
    return f"sum by ({by}) ({vector})" if by else f"sum({vector})"


def share(part: str, whole: str) -> str:
    """Nothing, instead of a division by zero, where there is no traffic."""
    return f"{part} / ({whole} > 0)"


def quantile(q: float, histogram: str, by: str = "") -> str:
    """Of a histogram of the chosen models. Without observations it is nothing, not NaN."""
    buckets = total(rate(of_model(f"{histogram}_bucket")), f"le, {by}" if by else "le")
    return f"histogram_quantile({q}, {buckets}) >= 0"


def mean(histogram: str, by: str = "") -> str:
    """Of what was observed."""
    sums, counts = rate(of_model(f"{histogram}_sum")), rate(of_model(f"{histogram}_count"))
    return share(total(sums, by), total(counts, by))
