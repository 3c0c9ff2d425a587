"""What the simulator is asked: grids, arrivals, requests and the capacity that loads are measured by."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from benchmarks.simulation import traces
from benchmarks.simulation.arrivals import Process, arrivals
from benchmarks.simulation.capacity import Demand, demand, request_work, requests_per_second
from benchmarks.simulation.coefficients import StepCosts, StepShape, read
from benchmarks.simulation.grid import FILE, Part, read_grid, write_capacities
from benchmarks.simulation.workload import workload
from tests.unit.simulated import COSTS, request, small_grid, steady

# --- what is written down


def test_the_grid_names_coefficients_that_are_there_and_its_capacities_follow_from_them() -> None:
    grid = read_grid()
    coefficients = read(grid.coefficients)
    for row in grid.rows:
        if all(traces.recorded(part.lengths) for part in row.parts):
            longest = min(grid.targets[part.targets].tpot for part in row.parts)
            rate = requests_per_second(coefficients, demand(coefficients.costs, row, "training"), longest)
            assert row.capacity == pytest.approx(rate, rel=0.01), row.name


def test_the_live_grids_name_rows_of_the_grid() -> None:
    names = {row.name for row in read_grid().rows}
    for file in ("live_cpu.toml", "live_gpu.toml"):
        grid = read_grid(FILE.with_name(file))
        assert {row.name for row in grid.rows} <= names
        assert read(grid.coefficients)


def test_capacities_are_written_into_their_rows_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(FILE.read_text())
    write_capacities({"code": 12.345, "mooncake": 0.5}, path)
    before, after = read_grid(), read_grid(path)
    rates = {row.name: row.capacity for row in before.rows} | {"code": 12.35, "mooncake": 0.5}
    assert {row.name: row.capacity for row in after.rows} == pytest.approx(rates, abs=0.006)
    assert msgspec.structs.replace(after, rows=before.rows) == before
    with pytest.raises(ValueError, match="0 rows named none"):
        write_capacities({"none": 1.0}, path)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"parts": [Part(lengths="azure-code", targets="none")]}, "no targets are named none"),
        ({"parts": [Part(lengths="azure-code", targets="chat", share=0.5)]}, "do not add up"),
        ({"arrivals": "trace", "parts": [Part(lengths="azure-code", targets="chat", share=0.5)] * 2}, "one trace"),
    ],
)
def test_a_grid_that_contradicts_itself_is_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        small_grid(**fields)


# --- workloads


@pytest.mark.parametrize("process", get_args(Process))
def test_arrivals_are_in_order_and_have_the_mean_rate(process: Process) -> None:
    counts = [arrivals(process, 50.0, 60.0, random.Random(seed)) for seed in range(20)]
    assert all(times == sorted(times) and 0 < times[0] <= times[-1] < 60 for times in counts)
    assert sum(map(len, counts)) / 20 == pytest.approx(3000, rel=0.1)
    assert arrivals(process, 50.0, 60.0, random.Random(3)) == counts[3]


def test_bursts_are_denser_than_a_poisson_process() -> None:
    def dispersion(process: Process) -> float:
        """Variance over mean of counts by second; 1 for a Poisson process."""
        times = arrivals(process, 100.0, 600.0, random.Random(1))
        counts = [0] * 600
        for time in times:
            counts[int(time)] += 1
        mean = sum(counts) / 600
        return sum((count - mean) ** 2 for count in counts) / 600 / mean

    assert dispersion("poisson") < 1.3
    assert dispersion("bursts") > 10


def test_without_recordings_the_fits_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(traces, "FOLDER", tmp_path)
    traces.load.cache_clear()
    try:
        assert not traces.recorded("azure-conversation")
        trace = traces.load("azure-conversation")
    finally:
        traces.load.cache_clear()
    assert len(trace) == 19_366
    # Of the recording: median 1,020 and 129. The fit is of logarithms, so medians are what it keeps.
    middle = len(trace) // 2
    assert sorted(each.prompt for each in trace)[middle] == pytest.approx(760, rel=0.1)
    assert sorted(each.output for each in trace)[middle] == pytest.approx(151, rel=0.1)


@pytest.mark.parametrize("process", ["trace", "poisson", "bursts"])
@pytest.mark.parametrize("load", [0.5, 1.5])
def test_a_workload_brings_the_work_that_its_load_says(process: str, load: float) -> None:
    grid = small_grid(arrivals=process)
    row = grid.rows[0]
    requests = workload(grid, row, load, 1, "scoring", COSTS)
    work = sum(request_work(COSTS, each.prompt, each.output) for each in requests)
    wanted = load * row.capacity * demand(COSTS, row, "training").work
    # The last arrival comes a little before the end of the run.
    assert work / requests[-1].arrival == pytest.approx(wanted, rel=0.03)
    assert workload(grid, row, load, 1, "scoring", COSTS) == requests
    assert workload(grid, row, load, 2, "scoring", COSTS) != requests


def test_training_and_scoring_take_different_requests() -> None:
    earlier, later = (traces.half("azure-code", which) for which in ("training", "scoring"))
    assert max(each.time for each in earlier) <= min(each.time for each in later)
    assert abs(len(earlier) - len(later)) <= 1


def test_blocks_of_a_trace_that_are_equal_are_equal_tokens() -> None:
    first, second = (replace(request(number, 0.0, prompt=1100), blocks=(7, number, 9)) for number in (1, 2))
    assert len(first.tokens()) == 1100
    assert first.tokens()[:512] == second.tokens()[:512]
    assert not set(first.tokens()[512:]) & set(second.tokens()[512:])


# --- capacity


def test_capacity_is_where_the_work_of_a_step_fills_it() -> None:
    wanted = Demand(work=0.01, tokens=10, outputs=1, resident=100)
    # Steps of 50 ms, 4 of which are the base: 46 ms for 10 ms a request, in 50 ms.
    assert requests_per_second(steady(), wanted, 0.05) == pytest.approx(92.0)
    # 16 rows of 50 outputs in each step: 16 / 50 requests a step, so shorter steps are better until they are full.
    crowded = replace(wanted, outputs=50)
    rate = requests_per_second(steady(), crowded, 0.05)
    step = 16 / (rate * 50)
    assert step == pytest.approx(0.004 + rate * step * 0.01, rel=0.02)


def test_request_work_adds_up_the_steps_of_a_request() -> None:
    prompt, output = 37, 4
    steps = [StepShape(rows=1, tokens=prompt, prompt_pairs=prompt * (prompt + 1) / 2)]
    steps += [StepShape(rows=1, tokens=1, decode_pairs=prompt + index) for index in range(1, output)]
    assert request_work(COSTS, prompt, output) == pytest.approx(sum(map(COSTS.work, steps)), rel=1e-3)


def test_more_tokens_cost_nothing_below_the_floor() -> None:
    costs = StepCosts(floor=0.007, floor_row=1e-5, base=0.001, token=1e-5)
    assert costs.seconds(StepShape(rows=1, tokens=1)) == costs.seconds(StepShape(rows=1, tokens=500)) == 0.00701
    assert costs.seconds(StepShape(rows=1, tokens=1000)) == pytest.approx(0.011)
