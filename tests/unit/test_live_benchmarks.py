"""The arithmetic of benchmarks that ask a real server; the runs themselves are commands (docs/benchmarking.md)."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.live_check import Line, record
from benchmarks.live_goodput import Cell, mean_goodput
from benchmarks.live_traffic import live_grid, mixed_traffic
from benchmarks.metrics_page import Page
from benchmarks.saturation import Found
from benchmarks.served_steps import LoggedStep, LoggedWork
from benchmarks.step_time_error import spread, spread_in_traffic
from benchmarks.worker_kills import Answer, Round, missed_bars
from server.metrics import Metrics
from server.worker.wire import EngineLoad, LoadReport, StepStats


def page(metrics: Metrics) -> Page:
    return Page(tuple(text_string_to_metric_families(metrics.render().decode())))


def report(**changes: float) -> LoadReport:
    load = EngineLoad(
        name="m",
        running=0,
        waiting=0,
        waiting_tokens=0,
        blocks_used=0,
        blocks_cached=0,
        blocks_total=70,
        token_budget=0,
        preemptions=0,
        prefix_queries=0,
        prefix_hits=0,
        integrity_errors=0,
    )
    return LoadReport(
        incarnation=1, steps=0, phase="step", rss_bytes=1, engines=[msgspec.structs.replace(load, **changes)]
    )


def test_idle_time_and_recompute_tax_are_read_off_the_metrics() -> None:
    metrics = Metrics(["m"], version="1")
    metrics.load_report(0, report(computed_tokens=500, recomputed_tokens=40, preemptions=1))
    before = page(metrics)
    for seconds in (0.25, 0.5):
        metrics.step("m", StepStats(seconds=seconds, plan_seconds=0.0, rows=1, tokens=1, prompt_tokens=0))
    metrics.load_report(0, report(computed_tokens=1500, recomputed_tokens=60, preemptions=4))
    found = Found.between(before, page(metrics), seconds=1.0)
    assert (found.steps, found.preemptions, found.kv_blocks) == (2, 3, 70)
    assert found.idle == pytest.approx(0.25)
    assert found.recompute_tax == pytest.approx(0.02)


def test_the_errors_that_are_read_are_those_that_the_worker_reports() -> None:
    metrics = Metrics(["m"], version="1")
    metrics.load_report(0, report(step_error_p50=0.04, step_error_p95=0.2))
    assert (page(metrics).value("step_error_p50"), page(metrics).value("step_error_p95")) == (0.04, 0.2)
    assert page(metrics).value("no_such_series") == 0


def test_a_refusal_falls_into_the_bucket_of_its_time() -> None:
    metrics = Metrics(["m"], version="1")
    metrics.refused("m", "late", "", 0.0015)
    buckets = page(metrics).buckets("refusal_seconds")
    assert (buckets[0.001], buckets[0.002], buckets[float("inf")]) == (0, 1, 1)


def test_the_spread_is_taken_from_each_shape_s_own_median() -> None:
    assert spread([[1.0, 1.0, 1.0], [5.0, 5.0, 5.0]]) == 0
    assert spread([[0.9, 1.0, 1.1] * 20]) == pytest.approx(0.1)


def test_steps_of_one_size_in_the_traffic_are_compared_with_each_other() -> None:
    def step(tokens: int, took: float) -> LoggedStep:
        return LoggedStep(took, LoggedWork(rows=1, tokens=tokens, decode_pairs=0.0, prompt_pairs=tokens * 10.0))

    steady = [step(100, 1.0)] * 20 + [step(200, 2.0)] * 20
    assert spread_in_traffic(steady) == 0
    assert spread_in_traffic([*steady, step(400, 9.0), step(400, 5.0)]) == 0, "two say nothing"
    assert spread_in_traffic(steady + [step(100, 1.5)] * 6) == pytest.approx(0.5)


def test_mixed_traffic_has_all_rows_at_the_load_and_in_order() -> None:
    grid = live_grid("cpu")
    requests = mixed_traffic(grid, 0.8, 60.0, seed=1)
    assert [request.number for request in requests] == list(range(len(requests)))
    assert all(earlier.arrival <= later.arrival for earlier, later in pairwise(requests))
    assert {request.targets for request in requests} == set(grid.targets.values())
    assert 40 < requests[-1].arrival < 120
    assert [request.arrival for request in mixed_traffic(grid, 0.8, 60.0, seed=1)] == [
        request.arrival for request in requests
    ]


def test_goodput_is_the_mean_over_the_loads() -> None:
    assert mean_goodput([Cell(0.8, 0.8, 0, 1), Cell(1.5, 1.0, 0.2, 1)]) == pytest.approx(0.9)


def test_the_pause_is_the_longest_silence_after_the_kill() -> None:
    async def main() -> list[float]:
        # At 10.1 comes what was on its way; all are silent until 13.
        times = [[9.0, 10.1, 13.0, 13.2], [9.5, 13.5], [9.9]]
        return Round([Answer(times=each) for each in times], killed_at=10.0, found_after=0.1).pauses()

    assert asyncio.run(main()) == pytest.approx([3.0, 3.5])


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, 0),
        ({"lost": 1}, 1),
        ({"changed": 2}, 1),
        ({"first_moves_seconds": {"max": 10.5}}, 1),
        ({"signal": "SIGSTOP", "first_moves_seconds": {"max": 10.5}}, 0),
        ({"signal": "SIGSTOP", "found_seconds": {"max": 5.1}}, 1),
    ],
)
def test_bars_of_killed_and_stopped_workers(changes: dict[str, object], missed: int) -> None:
    held = {"lost": 0, "changed": 0, "signal": "SIGKILL"}
    held |= {"first_moves_seconds": {"max": 9.9}, "found_seconds": {"max": 4.9}}
    assert len(list(missed_bars(held | changes))) == missed


def test_the_live_check_keeps_rows_that_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.report.RESULTS", tmp_path)
    grid = live_grid("cpu")
    for number, row in enumerate(grid.rows[:2]):
        line = Line(row=row.name, load=0.7, figure="goodput", real=(1.0, 0.0), simulated=(1.08, 0.0), bar=0.07)
        assert not line.held
        assert msgspec.structs.replace(line, bar=None).held
        record("check", grid, row, {"commit": number}, [line])
    rows = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert {name: row["machine"]["commit"] for name, row in rows.items()} == {
        row.name: number for number, row in enumerate(grid.rows[:2])
    }
