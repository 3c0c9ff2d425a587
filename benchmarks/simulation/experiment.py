"""The whole comparison: choose the baseline's settings on the training halves, then run every policy on every cell."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from benchmarks.simulation import policies
from benchmarks.simulation.coefficients import Coefficients
from benchmarks.simulation.grid import Grid
from benchmarks.simulation.journal import Journal
from benchmarks.simulation.policies import Policy
from benchmarks.simulation.run import Simulation
from benchmarks.simulation.scoring import Score, score
from benchmarks.simulation.traces import Half
from benchmarks.simulation.workload import workload


@dataclass(frozen=True, slots=True)
class Task:
    """One run."""

    policy: Policy
    row: str
    load: float
    seed: int
    which: Half = "scoring"


@dataclass(slots=True)
class Scores:
    """Scores of the runs of one policy, by row, load and seed."""

    policy: Policy
    runs: dict[tuple[str, float, int], Score]

    def mean(self, of: Callable[[Score], float], *, row: str | None = None, load: float | None = None) -> float:
        return statistics.fmean(self.by_seed(of, row=row, load=load))

    def by_seed(
        self, of: Callable[[Score], float], *, row: str | None = None, load: float | None = None
    ) -> list[float]:
        """For each seed the mean over rows and loads, or over those of one row or load."""
        chosen: dict[int, list[float]] = {}
        for (of_row, of_load, seed), run in self.runs.items():
            if row in (None, of_row) and load in (None, of_load):
                chosen.setdefault(seed, []).append(of(run))
        return [statistics.fmean(values) for _, values in sorted(chosen.items())]


@dataclass(slots=True)
class Comparison:
    """All that was run. ``fixed`` are the budgets among which an oracle may choose for each row."""

    grid: Grid
    coefficients: Coefficients
    best_static: Scores
    """The best single first-come-first-served policy, with or without a queue cap."""
    uncapped: Scores
    """The best of those without a cap."""
    aimd: Scores
    ours: Scores
    without: list[Scores]
    fixed: list[Scores]

    def all(self) -> list[Scores]:
        known = [self.ours, self.best_static, self.uncapped, self.aimd, *self.fixed, *self.without]
        return list({scores.policy.name: scores for scores in known}.values())


class Runner:
    """Runs tasks in processes; ``tell`` hears of progress. What the ``journal`` knows is not run again."""

    def __init__(
        self,
        grid: Grid,
        coefficients: Coefficients,
        jobs: int,
        tell: Callable[[str], None],
        journal: Journal | None = None,
    ) -> None:
        self._grid = grid
        self._journal = journal
        self._coefficients = msgspec.structs.replace(coefficients, samples=[])  # no run needs them
        self._jobs = jobs
        self._tell = tell

    def run(self, tasks: Sequence[Task]) -> list[Score]:
        """Scores in the order of the tasks."""
        journal = self._journal
        scores = {task: known for task in tasks if journal is not None and (known := journal.find(task)) is not None}
        missing = [task for task in dict.fromkeys(tasks) if task not in scores]
        if scores:
            self._tell(f"{len(scores)} of {len(tasks)} runs were done before")
        arguments = [(self._grid, self._coefficients, task) for task in missing]
        with multiprocessing.get_context("spawn").Pool(self._jobs) as pool:
            for task, result in zip(missing, pool.imap(_run_task, arguments), strict=True):
                scores[task] = result
                if journal is not None:
                    journal.add([(task, result)])
                if len(scores) % 50 == 0:
                    self._tell(f"{len(scores)} of {len(tasks)} runs")
        return [scores[task] for task in tasks]

    def compare(self) -> Comparison:
        """Raises ValueError for a grid without rows, loads or seeds."""
        grid = self._grid
        if not (grid.rows and grid.loads and grid.seeds):
            raise ValueError("a comparison needs rows, loads and seeds")
        capped, uncapped = self._train()
        fixed = [policies.fixed_budget(budget) for budget in grid.static_budgets]
        compared = [capped, uncapped, policies.AIMD, policies.OURS, *policies.WITHOUT, *fixed]
        scores = self._score({policy.name: policy for policy in compared}.values())
        return Comparison(
            grid=grid,
            coefficients=self._coefficients,
            best_static=scores[capped.name],
            uncapped=scores[uncapped.name],
            aimd=scores[policies.AIMD.name],
            ours=scores[policies.OURS.name],
            without=[scores[policy.name] for policy in policies.WITHOUT],
            fixed=[scores[policy.name] for policy in fixed],
        )

    def _train(self) -> tuple[Policy, Policy]:
        """The best first-come-first-served policy of all, and of those without a queue cap, by the mean over cells."""
        grid = self._grid
        candidates = [policies.first_come(budget, cap) for budget in grid.static_budgets for cap in grid.queue_caps]
        tasks = [
            Task(policy, row.name, load, grid.seeds[0], "training")
            for policy in candidates
            for row in grid.rows
            for load in grid.training_loads
        ]
        goodput: dict[str, float] = {}
        for task, result in zip(tasks, self.run(tasks), strict=True):
            goodput[task.policy.name] = goodput.get(task.policy.name, 0.0) + result.goodput
        ranked = sorted(candidates, key=lambda policy: -goodput[policy.name])
        cells = len(grid.rows) * len(grid.training_loads)
        for policy in ranked[:3]:
            self._tell(f"training: {policy.name} has a goodput of {goodput[policy.name] / cells:.3f}")
        return ranked[0], next(policy for policy in ranked if not policy.queue_cap)

    def _score(self, compared: Iterable[Policy]) -> dict[str, Scores]:
        grid = self._grid
        tasks = [
            Task(policy, row.name, load, seed)
            for policy in compared
            for row in grid.rows
            for load in grid.loads
            for seed in grid.seeds
        ]
        scores: dict[str, Scores] = {}
        for task, result in zip(tasks, self.run(tasks), strict=True):
            of_policy = scores.setdefault(task.policy.name, Scores(task.policy, {}))
            of_policy.runs[task.row, task.load, task.seed] = result
        return scores


def run_one(grid: Grid, coefficients: Coefficients, task: Task) -> Score:
    """The score of one run in this process."""
    row = next(row for row in grid.rows if row.name == task.row)
    requests = workload(grid, row, task.load, task.seed, task.which, coefficients.costs)
    simulation = Simulation(task.policy, coefficients, requests, max_output=grid.max_output, seed=task.seed)
    return score(simulation.run(), task.load)


def _run_task(arguments: tuple[Grid, Coefficients, Task]) -> Score:
    return run_one(*arguments)
