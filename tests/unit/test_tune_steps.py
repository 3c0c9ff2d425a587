"""Tuning linear layers by whole steps: the descent, the shares of time, the table. Needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.tune_descent import Assignment, Choice, Descent, first_choices, in_turns, table_of, variants
from benchmarks.tune_search import READY, Job, Search
from benchmarks.tune_tables import Entry, merged, write_table
from engines.kernels.cuda import tuning
from engines.kernels.cuda.tuning import (
    BUCKETS,
    Machine,
    SkinnyConfig,
    SkinnyShape,
    Table,
    config_for,
    fields_of,
    predicted_us,
    ranked,
    table_entries,
    table_name,
)

HOPPER = Machine("Some Hopper", (9, 0), 132, 233_472)
QKV, DOWN = SkinnyShape(2048, 1536, False, True), SkinnyShape(1536, 8960, False, False)
FAST = SkinnyConfig(16, 256, 4, 1, 4, 4, 512, True)


class Clock:
    """Each look takes a little, each measurement more."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


class FakeSteps:
    """Steps whose time is the sum of their layers', with what two of them gain together, and noise on demand."""

    def __init__(self, us: dict[tuple[SkinnyShape, Choice], float], clock: Clock | None = None) -> None:
        self.us, self.clock = us, clock or Clock()
        self.together: dict[frozenset[Choice], float] = {}
        self.lucky: set[Choice] = set()
        """Seem faster when they are first looked at."""
        self.wrong: set[Choice] = set()
        self.broken: set[Choice] = set()
        self.slow_compiles: set[Choice] = set()
        self.wanted: list[tuple[float, str, Assignment]] = []
        self.checked = 0

    def true_us(self, assignment: Assignment) -> float:
        us = 100 + sum(self.us.get(item, 50.0) for item in assignment.items())
        return us + self.together.get(frozenset(assignment.values()), 0.0)

    # the timer's

    def measure(self, assignment: Assignment, limit: float) -> float:
        self.clock.now += 0.03
        if self.broken & set(assignment.values()):
            raise RuntimeError("out of resource")
        return self.true_us(assignment) * (0.9 if self.lucky & set(assignment.values()) else 1)

    def compare(self, first: Assignment, second: Assignment) -> tuple[float, float]:
        self.clock.now += 0.05
        return self.true_us(first), self.true_us(second)

    # the bench's

    def timer(self, job: Job) -> FakeSteps:
        return self

    def right(self, job: Job, assignment: Assignment) -> bool:
        self.checked += 1
        return not self.wrong & set(assignment.values())

    def lost(self) -> bool:
        return False

    # the compiler's

    def want(self, job: Job, assignment: Assignment, priority: float) -> None:
        self.wanted.append((priority, job.name, assignment))

    def seen(self, job: Job, assignment: Assignment) -> str | None:
        return None if self.slow_compiles & set(assignment.values()) else READY

    def state(self, job: Job, assignment: Assignment) -> str | None:
        return self.seen(job, assignment)

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds


@pytest.fixture
def no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    config_for.cache_clear()
    yield tmp_path
    config_for.cache_clear()


def search_of(steps: FakeSteps) -> Search:
    return Search(HOPPER, steps, steps, steps.clock)


def one_of(shape: SkinnyShape, rows: int, place: int) -> SkinnyConfig:
    return ranked(shape, rows, HOPPER, 4)[place]


def test_a_change_is_taken_if_the_whole_step_is_faster_twice() -> None:
    steps = FakeSteps({(QKV, FAST): 40.0})
    descent = Descent(steps, {QKV: None, DOWN: None}, 200.0)
    assert descent.offer(QKV, FAST)
    assert descent.best == {QKV: FAST, DOWN: None}
    assert descent.us == 190.0
    assert not descent.offer(QKV, FAST)


def test_luck_and_small_gains_are_no_reason_to_change() -> None:
    steps = FakeSteps({(DOWN, FAST): 49.5})
    descent = Descent(steps, {QKV: None, DOWN: None}, 200.0)
    assert not descent.offer(DOWN, FAST)
    steps.lucky.add(FAST)
    assert not descent.offer(DOWN, FAST)
    assert descent.best == {QKV: None, DOWN: None}
    assert descent.runners_up(DOWN, 2) == [FAST]


def test_what_is_slow_alone_can_win_beside_the_others() -> None:
    steps = FakeSteps({(QKV, FAST): 45.0, (DOWN, FAST): 52.0})
    steps.together[frozenset({FAST})] = -9.0
    descent = Descent(steps, {QKV: None, DOWN: None}, 200.0)
    assert not descent.offer(DOWN, FAST)
    assert descent.offer(QKV, FAST)
    assert descent.offer(DOWN, FAST)
    assert descent.us == 188.0


@pytest.mark.parametrize("rows", BUCKETS)
def test_candidates_can_all_run(rows: int) -> None:
    choices = first_choices(QKV, rows, HOPPER, 8, [None, FAST])
    assert choices[0] is None
    assert len(set(choices)) == len(choices) > 4
    for choice in choices[1:]:
        assert choice is not None
        assert predicted_us(choice, QKV, rows, HOPPER) < float("inf")
        for other in variants(choice, QKV, rows, HOPPER):
            assert other is not None
            assert other != choice
            assert predicted_us(other, QKV, rows, HOPPER) < float("inf")


def test_lists_take_turns() -> None:
    assert in_turns([[(QKV, None), (QKV, FAST)], [(DOWN, FAST)]]) == [(QKV, None), (DOWN, FAST), (QKV, FAST)]


def test_a_search_finds_the_best_of_each_layer(no_tables: Path) -> None:
    best = {QKV: one_of(QKV, 32, 2), DOWN: None}
    steps = FakeSteps({(QKV, best[QKV]): 30.0, (DOWN, None): 35.0})
    search = search_of(steps)
    search.add("model", [32], [QKV, DOWN], 8)
    # The kernels of the steps that are timed first are asked for first.
    priorities = [priority for priority, _, _ in steps.wanted]
    assert priorities == sorted(priorities)
    (job,) = search.sweep(search.jobs, 60.0)
    assert job.kept == best
    assert job.before_us == 200.0
    assert job.after_us == 165.0
    assert search.found() == {QKV: {32: best[QKV]}, DOWN: {32: None}}


def test_the_second_sweep_tries_variants_of_the_winner(no_tables: Path) -> None:
    winner = one_of(QKV, 8, 1)
    variant = variants(winner, QKV, 8, HOPPER)[-1]
    steps = FakeSteps({(QKV, winner): 40.0, (QKV, variant): 35.0})
    search = search_of(steps)
    search.add("model", [8], [QKV], 8)
    for job in search.sweep(search.jobs, 60.0):
        search.add_second(job)
    assert search.jobs[0].kept == {QKV: winner}
    assert list(search.sweep(search.jobs, 120.0)) == search.jobs
    assert search.jobs[0].kept == {QKV: variant}


def test_wrong_results_are_not_kept_and_failures_stop_nothing(no_tables: Path) -> None:
    wrong, broken, good = one_of(QKV, 16, 1), one_of(QKV, 16, 2), one_of(DOWN, 16, 1)
    steps = FakeSteps({(QKV, wrong): 10.0, (QKV, broken): 5.0, (DOWN, good): 30.0})
    steps.wrong, steps.broken = {wrong}, {broken}
    search = search_of(steps)
    search.add("model", [16], [QKV, DOWN], 8)
    (job,) = search.sweep(search.jobs, 60.0)
    assert job.kept == {QKV: job.table[QKV], DOWN: good}
    assert any("wrong" in failure for failure in search.failures)
    assert any("out of resource" in failure for failure in search.failures)


def test_time_is_shared_and_kept(no_tables: Path) -> None:
    steps = FakeSteps({})
    search = search_of(steps)
    search.add("model", [1, 8, 16, 32, 64, 128], [QKV, DOWN], 16)
    # Some of the first job's kernels take for ever.
    steps.slow_compiles = {one_of(QKV, 1, 3)}
    done = list(search.sweep(search.jobs, 9.0))
    assert [job.rows for job in done] == [1, 8, 16, 32, 64, 128]
    assert 3.0 < steps.clock.now < 9.5
    assert [choice for _, choice in done[0].offers] == [one_of(QKV, 1, 3)]
    assert list(search.sweep(search.jobs, 9.0)) == []


def test_rows_in_between_take_the_better_of_their_neighbours(no_tables: Path) -> None:
    above, below = one_of(QKV, 32, 1), one_of(QKV, 16, 0)
    steps = FakeSteps({(QKV, above): 40.0, (QKV, below): 39.0})
    search = search_of(steps)
    search.add("model", [16, 32], [QKV], 8)
    for job, winner in zip(search.jobs, (below, above), strict=True):
        job.kept = {QKV: winner}
        job.descent = Descent(steps, dict(job.kept), 190.0)
    (between,) = search.add_between("model", [24, 200])
    assert between.kept == {QKV: above}
    assert list(search.sweep([between], 60.0)) == [between]
    assert search.found()[QKV] == {16: below, 32: above, 24: below}


def test_a_table_keeps_what_was_not_tuned(no_tables: Path) -> None:
    other = SkinnyConfig(32, 256, 4, 1, 4, 4, 512, True)
    old: dict[str, Entry] = {
        QKV.key(): {"1": fields_of(other), "32": fields_of(other), "64": None},
        "8x16": {"1": None},
    }
    entries = merged(old, {QKV: {32: FAST, 24: None, 16: FAST, 12: FAST}, DOWN: {64: FAST}}, HOPPER)
    assert entries["8x16"] == {"1": None}
    assert list(entries[QKV.key()]) == ["1", "16", "24", "32", "64"]
    assert entries[QKV.key()]["24"] is None
    assert entries[QKV.key()]["1"] == fields_of(other)
    assert entries[DOWN.key()]["64"] == fields_of(FAST)
    assert list(map(int, entries[DOWN.key()])) == list(BUCKETS)
    assert old[QKV.key()]["32"] == fields_of(other)
    path = write_table(no_tables, HOPPER, entries)
    assert path.name == table_name(HOPPER.name)
    assert json.loads(path.read_text())["gpu"] == HOPPER.name
    assert table_entries(HOPPER, no_tables) == entries
    assert Table(entries).find(QKV, 20) == (True, None)
    assert Table(entries).find(QKV, 30) == (True, FAST)


def test_an_assignment_is_a_table() -> None:
    table = table_of({QKV: FAST, DOWN: None}, 48)
    assert table.find(QKV, 48) == (True, FAST)
    assert table.find(DOWN, 48) == (True, None)
