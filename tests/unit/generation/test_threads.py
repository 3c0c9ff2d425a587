from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engines.generation.loading import choose_step_tokens
from engines.generation.threads import StepCost, ThreadGovernor, available_cores, candidates, choose_threads


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Machine:
    """Steps whose duration is a function of tokens and thread count, on a clock of their own."""

    def __init__(self, seconds: Callable[[int, int], float]) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.tried: list[int] = []

    def clock(self) -> float:
        return self.now

    def run(self, tokens: int) -> float:
        self.tried.append(torch.get_num_threads())
        took = self.seconds(tokens, self.tried[-1])
        self.now += took
        return took

    def choose(self, cores: int) -> tuple[int, StepCost]:
        return choose_threads(cores, self.run, 1, 64, self.clock)

    def govern(self, governor: ThreadGovernor, steps: int, tokens: int = 4) -> list[int]:
        """Thread counts of the next steps."""
        self.tried.clear()
        for _ in range(steps):
            governor.prepare(tokens)
            governor.observe(tokens, self.run(tokens))
        return self.tried


def quiet(tokens: int, threads: int) -> float:
    return (0.01 + 0.001 * tokens) / threads


def busy(tokens: int, threads: int) -> float:
    return quiet(tokens, 1) * (1 if threads == 1 else 10)


def test_a_quiet_machine_uses_all_cores() -> None:
    threads, cost = Machine(quiet).choose(6)
    assert threads == torch.get_num_threads() == 6
    assert cost.seconds(30) == pytest.approx(quiet(30, 6))


def test_a_busy_machine_uses_one_thread_and_does_not_try_them_all() -> None:
    machine = Machine(busy)
    assert machine.choose(64)[0] == 1
    assert set(machine.tried) == {1, 2}


def test_both_sizes_count_by_their_ratio() -> None:
    # The small step loses a factor 1.9 by a second thread, the large one gains 1.1: one thread is the better choice.
    machine = Machine(lambda tokens, threads: 1 + 0.9 * (threads - 1) if tokens == 1 else 100 / (1 + 0.1 * threads))
    assert machine.choose(2)[0] == 1


def test_threads_follow_the_machines_load_and_losers_are_tried_ever_more_seldom() -> None:
    machine = Machine(quiet)
    governor = ThreadGovernor(2, *machine.choose(2), machine.clock)
    assert 1 not in machine.govern(governor, 2000)
    machine.seconds = busy
    at_once = machine.govern(governor, 6)
    assert at_once[-1] == 1
    # 60 seconds of steps: a try after 1 s, 2 s, 4 s ...
    assert machine.govern(governor, 4000).count(2) <= 8
    machine.seconds = quiet
    machine.govern(governor, 8000)
    assert machine.govern(governor, 100).count(2) >= 95


def test_more_threads_are_not_tried_in_a_long_step() -> None:
    machine = Machine(busy)
    governor = ThreadGovernor(2, *machine.choose(2), machine.clock)
    assert set(machine.govern(governor, 50, tokens=500)) == {1}
    assert 2 in machine.govern(governor, 2)


def test_steps_of_one_size_decide_nothing_for_those_of_another() -> None:
    """One token gains nothing by a second thread, thirty gain nearly a factor of 2."""
    machine = Machine(lambda tokens, threads: 0.01 + (0 if tokens == 1 else 0.02 / threads))
    governor = ThreadGovernor(2, 1, StepCost(0.01, 0.0007), machine.clock)
    assert machine.govern(governor, 100, tokens=1).count(2) <= 3
    assert set(machine.govern(governor, 50, tokens=30)[1:]) == {2}
    assert machine.govern(governor, 50, tokens=1).count(2) <= 1


def test_candidates() -> None:
    assert [candidates(cores) for cores in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_a_cpu_quota_bounds_the_cores(tmp_path: Path) -> None:
    assert available_cores(tmp_path) >= 1
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert available_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert available_cores(tmp_path) == available_cores(tmp_path / "none")


def test_step_size_follows_the_models_speed() -> None:
    assert [choose_step_tokens(seconds) for seconds in (1e-4, 1.5e-3, 3e-3, 1.0)] == [512, 256, 128, 128]
