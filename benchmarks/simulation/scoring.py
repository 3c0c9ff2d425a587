"""From the outcomes of runs to figures: shares of requests that met their targets, quantiles, means with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import msgspec

from benchmarks.simulation.run import Outcome, RunResult

WARM_UP = 0.1
"""Share of a run's requests, the first ones, that fill the machine and are not counted."""
_T_975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for two-sided 95 % by degrees of freedom; 1.96 beyond."""


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one run. Times in seconds. Those with a default are known of simulated runs only."""

    requests: int
    attainment: float
    """Share of all offered requests that met every target."""
    goodput: float
    """Of capacity: attainment times the load."""
    refused: float
    """Share of all offered requests."""
    admitted_met: float
    """Share of those not refused that met every target; ``admitted_ttft`` and ``admitted_tpot`` by target."""
    admitted_ttft: float
    admitted_tpot: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    tpot_p50: float
    tpot_p90: float
    tpot_p99: float
    gap_p99: float
    """Of each stream's longest gap."""
    worst_tenant: float
    """Attainment of the tenant, or where there is one only of the priority class, that fares worst."""
    busy: float = 0.0
    """Share of the run in which the device worked."""
    recomputed: float = 0.0
    """Recompute tax: tokens computed again over all computed."""
    step_error_p50: float = 0.0
    step_error_p95: float = 0.0
    plan_p99: float = 0.0
    """Of ``plan`` in this process."""
    decisions: dict[str, int] = {}


def score(result: RunResult, load: float) -> Score:
    """Figures of a simulated run at ``load`` times the capacity."""
    return msgspec.structs.replace(
        score_outcomes(result.outcomes, load),
        busy=result.busy / result.seconds,
        recomputed=result.load.recomputed_tokens / max(1, result.load.computed_tokens),
        step_error_p50=result.load.step_error_p50,
        step_error_p95=result.load.step_error_p95,
        plan_p99=quantile(sorted(result.plan_seconds), 0.99),
        decisions=result.load.decisions,
    )


def score_outcomes(every: Sequence[Outcome], load: float) -> Score:
    """What the clients of a run saw; its first requests are not counted."""
    outcomes = every[int(len(every) * WARM_UP) :]
    admitted = [outcome for outcome in outcomes if not outcome.refused]
    ttft = sorted(outcome.ttft for outcome in admitted if outcome.ttft is not None)
    tpot = sorted(outcome.tpot for outcome in admitted if outcome.tokens > 1)
    gaps = sorted(outcome.longest_gap for outcome in admitted)
    attainment = _share(outcome.met for outcome in outcomes)
    return Score(
        requests=len(outcomes),
        attainment=attainment,
        goodput=attainment * load,
        refused=1 - len(admitted) / len(outcomes),
        admitted_met=_share(outcome.met for outcome in admitted),
        admitted_ttft=_share(outcome.met_ttft for outcome in admitted),
        admitted_tpot=_share(outcome.tpot <= outcome.request.targets.tpot for outcome in admitted),
        ttft_p50=quantile(ttft, 0.5),
        ttft_p90=quantile(ttft, 0.9),
        ttft_p99=quantile(ttft, 0.99),
        tpot_p50=quantile(tpot, 0.5),
        tpot_p90=quantile(tpot, 0.9),
        tpot_p99=quantile(tpot, 0.99),
        gap_p99=quantile(gaps, 0.99),
        worst_tenant=_worst(outcomes),
    )


def _share(met: Iterable[bool]) -> float:
    answers = list(met)
    return sum(answers) / len(answers) if answers else 1.0


def _worst(outcomes: Sequence[Outcome]) -> float:
    parts: dict[tuple[str, str], list[bool]] = {}
    for outcome in outcomes:
        parts.setdefault((outcome.request.tenant, outcome.request.priority), []).append(outcome.met)
    return min(_share(part) for part in parts.values())


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of ascending values, the one below which ``share`` of them lie; 0 of none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of repeats, and half the width of its 95 % interval (Student's t); 0 for a single one."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, 0.0
    degrees = len(values) - 1
    factor = _T_975[degrees] if degrees < len(_T_975) else 1.96
    return mean, factor * statistics.stdev(values) / math.sqrt(len(values))
