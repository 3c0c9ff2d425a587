"""Step times out of a server's log."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.served_steps import MOST_SHAPES, LoggedStep, LoggedWork, fitted, logged_steps, merged
from benchmarks.simulation.coefficients import StepShape, read

LOG = """12:00:01 INFO worker: ready
12:00:02 DEBUG worker: step: {"took":0.0312,"work":{"rows":4,"tokens":70,"prompt_tokens":67,"decode_pairs":300.0,\
"prompt_pairs":2278.0,"seconds":0.03,"padding":58}}
12:00:02 INFO worker: a step: that is no record
"""


def test_only_the_step_lines_of_a_log_are_read(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(LOG)
    (step,) = logged_steps(tmp_path / "log")
    assert step.took == 0.0312
    assert step.work == LoggedWork(4, 70, 300.0, 2278.0, padding=58)
    (sample,) = merged([step])
    assert sample.shape.tokens == 128


def random_steps(count: int, slower: float) -> list[LoggedStep]:
    """What a server logs whose steps take ``slower`` times as long as the stored costs say."""
    costs, steps = read("cpu_smollm2").costs, []
    for _ in range(count):
        rows = random.randint(1, 40)
        chunk, context = random.choice([0, 0, random.randint(2, 400)]), random.randint(20, 900)
        work = LoggedWork(rows, rows - (chunk > 0) + chunk, float(rows * context), chunk * (chunk + 1) / 2)
        shape = StepShape(
            rows=work.rows, tokens=work.tokens, decode_pairs=work.decode_pairs, prompt_pairs=work.prompt_pairs
        )
        steps.append(LoggedStep(slower * costs.seconds(shape) * random.uniform(0.95, 1.05), work))
    return steps


def test_many_steps_become_few_samples_and_none_is_lost() -> None:
    samples = merged(random_steps(3000, 1.0))
    assert len(samples) <= MOST_SHAPES
    assert sum(len(sample.seconds) for sample in samples) == 3000


def test_the_fit_finds_how_much_slower_steps_are_in_service() -> None:
    alone = read("cpu_smollm2")
    served = fitted(alone, random_steps(3000, 1.4))
    for shape in (
        StepShape(rows=8, tokens=8, decode_pairs=3000.0),
        StepShape(rows=9, tokens=200, prompt_pairs=20000.0),
    ):
        assert served.costs.seconds(shape) == pytest.approx(1.4 * alone.costs.seconds(shape), rel=0.08)
    assert served.errors["p50"] < 0.05
