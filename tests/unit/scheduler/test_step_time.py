from __future__ import annotations

import math
import random

import pytest

from server.scheduler.step_time import PATIENCE, StepTimeModel, attended_pairs


def seconds(tokens: int, pairs: float, scale: float = 1.0) -> float:
    """A machine with 8 ms a step, 0.2 ms a token and 0.1 us a pair."""
    return scale * (8e-3 + 2e-4 * tokens + 1e-7 * pairs)


def random_step(rng: random.Random) -> tuple[int, float]:
    """Some decodes, and in half of the steps a chunk of a prompt."""
    rows = [(rng.randrange(4000), 1) for _ in range(rng.randint(1, 64))]
    if rng.random() < 0.5:
        rows.append((rng.randrange(2000), rng.randint(1, 512)))
    return sum(count for _, count in rows), sum(attended_pairs(start, count) for start, count in rows)


def trained(steps: int = 200, noise: float = 0.0) -> StepTimeModel:
    rng = random.Random(1)
    model = StepTimeModel()
    for _ in range(steps):
        step = random_step(rng)
        model.observe(*step, seconds(*step) * (1 + rng.uniform(-noise, noise)))
    return model


def worst_error(model: StepTimeModel, scale: float = 1.0) -> float:
    rng = random.Random(2)
    steps = [random_step(rng) for _ in range(200)]
    return max(abs(model.predict(*step) / seconds(*step, scale) - 1) for step in steps)


def test_attended_pairs_counts_each_query_with_its_keys() -> None:
    assert attended_pairs(0, 4) == 1 + 2 + 3 + 4
    assert attended_pairs(10, 2) == 11 + 12


def test_learns_a_linear_machine_from_a_few_steps() -> None:
    assert worst_error(trained(12)) < 0.02
    assert worst_error(trained(200, noise=0.05)) < 0.05


def test_is_warm_only_after_some_steps() -> None:
    assert not trained(2).warm
    assert trained(3).warm


@pytest.mark.parametrize("absurd", [0.0, -1.0, math.nan, math.inf, 100.0, 1e-9])
def test_ignores_what_cannot_be_a_measurement(absurd: float) -> None:
    model = trained()
    before = model.predict(100, 1e5)
    model.observe(100, 1e5, absurd)
    assert model.predict(100, 1e5) == before


def test_follows_a_machine_that_became_much_slower() -> None:
    model = trained()
    rng = random.Random(3)
    for _ in range(PATIENCE + 60):
        step = random_step(rng)
        model.observe(*step, seconds(*step, 10.0))
    assert worst_error(model, 10.0) < 0.05


def test_follows_a_slow_drift() -> None:
    model = trained()
    rng = random.Random(3)
    for index in range(300):
        step = random_step(rng)
        model.observe(*step, seconds(*step, 1 + index / 300))
    assert worst_error(model, 2.0) < 0.1


def test_keeps_the_cost_of_prompts_through_a_long_time_of_decodes() -> None:
    model = trained()
    for index in range(5000):
        pairs = 32 * (500 + index % 300)
        model.observe(32, pairs, seconds(32, pairs))
    chunk = (512, attended_pairs(0, 512))
    assert model.predict(*chunk) == pytest.approx(seconds(*chunk), rel=0.1)


@pytest.mark.parametrize("start", [0, 500, 4000])
def test_tokens_within_is_the_inverse_of_predict(start: int) -> None:
    model = trained()
    count = model.tokens_within(start, 0.05)

    def added(tokens: int) -> float:
        return model.predict(tokens, attended_pairs(start, tokens)) - model.predict(0, 0)

    assert added(count) <= 0.05 < added(count + 1)


def test_tokens_within_needs_time_and_knows_no_bound_before_it_has_learnt() -> None:
    assert trained().tokens_within(0, 0.0) == 0
    assert trained().tokens_within(0, -1.0) == 0
    assert StepTimeModel().tokens_within(0, 0.01) > 1e6
