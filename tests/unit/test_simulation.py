"""Runs of the simulator: the device and its clock, scores, and the comparison in short."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from benchmarks.simulation.coefficients import Coefficients, HostCosts, StepShape
from benchmarks.simulation.experiment import Runner, Task
from benchmarks.simulation.journal import Journal, world
from benchmarks.simulation.plot import draw
from benchmarks.simulation.policies import OURS, first_come
from benchmarks.simulation.run import Outcome, Simulation
from benchmarks.simulation.scoring import Score, mean_interval, score, score_outcomes
from benchmarks.simulation.tables import Bar, bars, markdown
from benchmarks.simulation.workload import workload
from tests.unit.simulated import COSTS, request, small_grid, steady

# --- runs


def test_one_request_alone_takes_what_its_steps_take() -> None:
    simulation = Simulation(OURS, steady(gap=0.001), [request(0, 2.0, prompt=100, output=3)], max_output=64, seed=0)
    result = simulation.run()
    (outcome,) = result.outcomes
    prefill = COSTS.seconds(StepShape(rows=1, tokens=100, prompt_pairs=5050)) + 0.001
    decode = COSTS.seconds(StepShape(rows=1, tokens=1, decode_pairs=101)) + 0.001
    assert outcome.ttft == pytest.approx(prefill)
    assert outcome.tpot == pytest.approx(decode, rel=1e-4)
    assert (outcome.tokens, outcome.refused, outcome.met) == (3, False, True)
    # The step that was launched before the last token was known.
    assert result.steps == 4


def test_the_loop_delays_steps_only_where_it_takes_longer_than_they_do() -> None:
    def tpot(host: HostCosts) -> float:
        device = msgspec.structs.replace(steady(), host=host)
        (outcome,) = Simulation(OURS, device, [request(0, 0.0, output=50)], max_output=64, seed=0).run().outcomes
        return outcome.tpot

    decode = COSTS.seconds(StepShape(rows=1, tokens=1, decode_pairs=125))
    assert tpot(HostCosts(step=0.001, row=0.001)) == pytest.approx(decode, rel=0.01)
    assert tpot(HostCosts(step=0.006, row=0.004)) == pytest.approx(0.010, rel=0.01)


@pytest.mark.parametrize("policy", [OURS, first_come(128, 0)], ids=["ours", "static"])
def test_every_request_hears_all_its_tokens_or_none(policy: object) -> None:
    grid = small_grid()
    requests = workload(grid, grid.rows[0], 1.5, 1, "scoring", COSTS)
    noisy = msgspec.structs.replace(steady(), deviations=[0.9, 1.0, 1.2], residuals=[0.95, 1.05])
    result = Simulation(policy, noisy, requests, max_output=grid.max_output, seed=1).run()  # type: ignore[arg-type]
    assert [outcome.request for outcome in result.outcomes] == requests
    for outcome in result.outcomes:
        assert outcome.tokens == (0 if outcome.refused else outcome.request.output)
        assert outcome.refused == (outcome.first is None)
    assert result.busy <= result.seconds
    assert (result.load.running, result.load.waiting, result.load.blocks_used) == (0, 0, 0)


def test_equal_seeds_give_equal_runs() -> None:
    grid = small_grid()
    requests = workload(grid, grid.rows[0], 1.2, 1, "scoring", COSTS)
    noisy = msgspec.structs.replace(steady(), deviations=[0.9, 1.0, 1.2])
    first, second = (
        Simulation(OURS, noisy, requests, max_output=grid.max_output, seed=1).run().outcomes for _ in range(2)
    )
    assert first == second


def test_a_queue_cap_refuses_what_comes_behind_it() -> None:
    crowd = [request(number, 0.0) for number in range(10)]
    outcomes = Simulation(first_come(100, 4), steady(), crowd, max_output=64, seed=0).run().outcomes
    assert [outcome.refused for outcome in outcomes] == [False] * 4 + [True] * 6


# --- scores


def outcome(number: int, ttft: float | None, tpot: float = 0.01, tokens: int = 5) -> Outcome:
    asked = request(number, float(number), output=tokens)
    if ttft is None:
        return Outcome(asked, refused=True)
    return Outcome(asked, first=number + ttft, last=number + ttft + tpot * (tokens - 1), tokens=tokens)


def test_refusals_and_missed_targets_are_misses_and_the_first_requests_do_not_count() -> None:
    outcomes = [outcome(0, 9.0), outcome(1, None), outcome(2, 2.0), outcome(3, 0.5, tpot=0.06)]
    outcomes += [outcome(number, 0.5) for number in range(4, 10)]
    of_all = score_outcomes(outcomes, 1.5)
    assert of_all.requests == 9
    assert of_all.attainment == pytest.approx(6 / 9)
    assert of_all.goodput == pytest.approx(1.0)
    assert of_all.refused == pytest.approx(1 / 9)
    assert of_all.admitted_met == pytest.approx(6 / 8)
    assert of_all.admitted_ttft == pytest.approx(7 / 8)
    assert (of_all.ttft_p50, of_all.ttft_p99) == (0.5, 2.0)


def test_the_tenant_that_fares_worst_is_seen() -> None:
    outcomes = [outcome(number, 0.5) for number in range(20)]
    for each in outcomes[10:]:
        each.request = replace(each.request, tenant="late")
    outcomes[12].first = 100.0
    assert score_outcomes(outcomes, 1.0).worst_tenant == pytest.approx(0.9)


def test_the_interval_is_that_of_students_t() -> None:
    mean, half = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776 * 1.5811 / 5**0.5, rel=1e-3)
    assert mean_interval([7.0]) == (7.0, 0.0)


@pytest.mark.parametrize(("least", "most", "held"), [(1.0, None, True), (1.3, None, False), (None, 1.1, False)])
def test_a_bar_is_held_on_its_side(least: float | None, most: float | None, held: bool) -> None:
    bar = Bar("b", 1.2, 0.1, least=least, most=most)
    assert bar.held is held
    assert ("held" if held else "MISSED") in bar.line()


# --- the comparison itself, in short


def test_ours_keeps_its_goodput_in_an_overload_where_first_come_first_served_loses_it() -> None:
    grid = small_grid(arrivals="bursts", seconds=25.0)

    def goodput(policy: object, load: float) -> float:
        requests = workload(grid, grid.rows[0], load, 1, "scoring", COSTS)
        run = Simulation(policy, steady(), requests, max_output=grid.max_output, seed=1).run()  # type: ignore[arg-type]
        return score(run, load).goodput

    static = first_come(256, 0)
    peak = max(goodput(OURS, load) for load in (0.8, 1.0, 1.2))
    assert goodput(OURS, 1.5) >= 0.9 * peak
    assert goodput(static, 1.5) <= 0.5 * goodput(OURS, 1.5)


def test_a_stopped_comparison_goes_on_where_it_was(tmp_path: Path) -> None:
    grid = msgspec.structs.replace(small_grid(), seconds=3.0)
    tasks = [Task(OURS, grid.rows[0].name, 0.8, seed) for seed in (1, 2, 3)]
    path = tmp_path / "journal.jsonl"

    def runner(heard: list[str], coefficients: Coefficients) -> Runner:
        return Runner(grid, coefficients, 1, heard.append, Journal(path, world(grid, coefficients)))

    first = runner([], steady()).run(tasks[:2])
    path.write_bytes(path.read_bytes()[:-10])  # killed while it wrote the second
    heard: list[str] = []
    again = runner(heard, steady()).run(tasks)
    assert heard == ["1 of 3 runs were done before"]
    assert [replaced(score) for score in again[:2]] == [replaced(score) for score in first]
    assert len({score.ttft_p90 for score in again}) == 3
    heard = []
    runner(heard, steady()).run(tasks)
    assert heard == ["3 of 3 runs were done before"]
    assert Journal(path, world(grid, msgspec.structs.replace(steady(), note="another"))).find(tasks[0]) is None


def replaced(score: Score) -> Score:
    """Without what this machine's clock says."""
    return msgspec.structs.replace(score, plan_p99=0.0)


def test_the_whole_comparison_in_short(tmp_path: Path) -> None:
    grid = msgspec.structs.replace(small_grid(), seconds=3.0, training_seconds=3.0, queue_caps=[0, 8], loads=[0.8, 1.5])
    heard: list[str] = []
    comparison = Runner(grid, steady(), 1, heard.append).compare()
    assert len(comparison.ours.runs) == len(grid.rows) * len(grid.loads) * len(grid.seeds)
    assert comparison.uncapped.policy.queue_cap == 0
    assert any("training" in text for text in heard)
    text = markdown(comparison, ["a note"])
    assert all(f"| {scores.policy.name} |" in text for scores in comparison.all())
    assert sum(bar.name in text for bar in bars(comparison)) == 12
    first, second = tmp_path / "a.svg", tmp_path / "images" / "b.svg"
    for path in (first, second):
        draw(comparison, path)
    assert first.read_bytes() == second.read_bytes()
    assert b"adaptive" in first.read_bytes()
