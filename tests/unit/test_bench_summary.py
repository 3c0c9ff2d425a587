"""Figures from outcomes whose times are known."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from server.bench.show import notes, show
from server.bench.summary import ClientHealth, Quantiles, Summary, quantile, summarize
from server.bench.wire import Health, Outcome

GOOD_CLIENT = Health(cpu_share=0.2, loop_lag_p99=0.001)


def outcome(due: float = 0.0, **fields: Any) -> Outcome:
    """First token after 0.1 s, then ten more in steps of 0.01 s."""
    values: dict[str, Any] = {
        "due": due,
        "sent": due + 0.001,
        "first": due + 0.1,
        "last": due + 0.2,
        "ended": due + 0.21,
        "longest_gap": 0.02,
        "events": 11,
        "input_tokens": 100,
        "tokens": 11,
        "counted": True,
    }
    return Outcome(**values | fields)


def failed(kind: str, due: float = 0.0) -> Outcome:
    return Outcome(due=due, sent=due, ended=due + 0.01, error=kind, detail=f"why {kind}")


def summary_of(outcomes: list[Outcome], **slo: float) -> Summary:
    return summarize(outcomes, [GOOD_CLIENT], seed=0, slo=slo, open_loop=True)


def test_quantiles_interpolate() -> None:
    assert quantile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.5
    assert quantile([7.0], 0.99) == 7.0
    assert quantile(list(map(float, range(101))), 0.9) == 90.0
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


def test_p99_needs_500_values() -> None:
    assert Quantiles.of([1.0] * 499).p99 is None
    assert Quantiles.of([1.0] * 500).p99 == 1.0
    assert Quantiles.of([]) == Quantiles(None, None, None)


def test_the_median_over_seeds_has_a_p99_only_where_all_have_one() -> None:
    runs = [Quantiles(1.0, 2.0, 3.0), Quantiles(5.0, 1.0, None), Quantiles(2.0, 9.0, 4.0)]
    assert Quantiles.median(runs) == Quantiles(2.0, 2.0, None)


def test_metrics_and_rates() -> None:
    summary = summary_of([outcome(due=float(second)) for second in range(10)])
    assert summary.metrics["ttft"].p50 == pytest.approx(0.1)
    assert summary.metrics["tpot"].p50 == pytest.approx(0.01)
    assert summary.metrics["gap"].p90 == pytest.approx(0.02)
    assert summary.metrics["e2e"].p90 == pytest.approx(0.21)
    assert summary.seconds == pytest.approx(9.21)
    assert summary.output_tokens_per_second == pytest.approx(110 / 9.21)
    assert summary.input_tokens_per_second == pytest.approx(1000 / 9.21)
    assert summary.tokens_per_event == 1.0


def test_a_single_token_has_no_tpot_and_no_gap_to_miss() -> None:
    summary = summary_of([outcome(tokens=1, events=1, last=0.1)], tpot=0.001, gap=0.001)
    assert summary.metrics["tpot"].p50 is None
    assert summary.good == 1


def test_a_request_that_failed_is_a_miss_and_gives_no_latency() -> None:
    outcomes = [outcome(), failed("http 429"), failed("http 503"), failed("http 503"), failed("timeout")]
    summary = summary_of(outcomes, ttft=0.2)
    assert (summary.requests, summary.complete, summary.good) == (5, 1, 1)
    assert summary.refused == {"http 429": 1, "http 503": 2}
    assert summary.errors == {"timeout": 1}
    assert summary.metrics["ttft"].p90 == pytest.approx(0.1)


@pytest.mark.parametrize(("slo", "good"), [({"ttft": 0.09}, 0), ({"ttft": 0.11, "tpot": 0.009}, 0), ({"e2e": 0.3}, 1)])
def test_goodput_needs_every_target(slo: dict[str, float], good: int) -> None:
    assert summary_of([outcome()], **slo).good == good


def test_the_client_says_when_it_was_the_limit() -> None:
    assert ClientHealth.of([outcome()], [GOOD_CLIENT], open_loop=True).limits == []
    late = ClientHealth.of([outcome(sent=0.05)], [GOOD_CLIENT], open_loop=True)
    assert late.late_p99 == pytest.approx(0.05)
    assert "50 ms late" in late.limits[0]
    assert ClientHealth.of([outcome(sent=0.05)], [GOOD_CLIENT], open_loop=False).limits == []
    busy = ClientHealth.of([outcome()], [GOOD_CLIENT, Health(cpu_share=0.95, loop_lag_p99=0.02)], open_loop=True)
    assert len(busy.limits) == 2


def shown(summaries: list[Summary], slo: dict[str, float]) -> str:
    console = Console(width=80, record=True, file=None)
    with console.capture() as capture:
        show(console, summaries, slo)
    return capture.get()


def test_the_tables_fit_a_terminal_and_tell_what_went_wrong() -> None:
    good = summary_of([outcome(due=float(second)) for second in range(600)], ttft=0.2)
    bad = summary_of([outcome(), failed("http 503")], ttft=0.2)
    text = shown([good, good, bad], {"ttft": 0.2})
    assert "time to first token" in text
    assert "median of 3 seeds" in text
    assert "50.0%" in text
    assert "1 x http 503: why http 503" in text
    assert "p99 needs 500" in text
    assert "the client kept up" in text
    assert "p99 needs" not in shown([good], {})


def test_notes_about_how_tokens_were_counted() -> None:
    text = "\n".join(notes([summary_of([outcome(counted=False), outcome(events=5)])], {}))
    assert "does not report usage" in text
    assert "tokens on average" in text
