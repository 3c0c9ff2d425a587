"""Coefficients come back from the steps that they made."""

from __future__ import annotations

import random

import numpy as np
import pytest

from benchmarks.simulation.coefficients import StepCosts, StepSample, StepShape, quantiles, shape_of
from benchmarks.simulation.fitting import deviations, error_summary, fit, non_negative, residuals
from engines.protocol import Row, StepPlan

FLAT = StepCosts(base=0.002, token=2e-5, row=1e-6, decode_pair=1e-8, prompt_pair=4e-10)
FLOORED = StepCosts(floor=0.007, floor_row=4e-6, base=0.001, token=6e-6, decode_pair=1.4e-8, prompt_pair=4e-10)


def samples(costs: StepCosts, noise: float) -> list[StepSample]:
    """Steps of many sizes, as ``benchmarks.step_times`` takes them."""
    randomness = random.Random(0)
    shapes = [
        StepShape(rows=rows, tokens=rows, decode_pairs=rows * context)
        for rows in (1, 4, 16, 64, 256)
        for context in (32, 512, 8192)
    ]
    shapes += [
        StepShape(rows=1, tokens=chunk, prompt_pairs=chunk * (start + chunk / 2))
        for chunk in (64, 512, 1024, 2048, 8192)
        for start in (0, 1024, 8192)
    ]
    return [
        StepSample(shape=shape, seconds=[costs.seconds(shape) * randomness.gauss(1, noise) for _ in range(9)])
        for shape in shapes
    ]


@pytest.mark.parametrize("costs", [FLAT, FLOORED], ids=["flat", "floored"])
def test_exact_steps_are_fitted_exactly(costs: StepCosts) -> None:
    fitted = fit(samples(costs, 0.0))
    assert error_summary(fitted, samples(costs, 0.0))["p95"] < 1e-3
    assert fitted.token == pytest.approx(costs.token, rel=0.01)
    assert fitted.floor == pytest.approx(costs.floor, rel=0.01)


@pytest.mark.parametrize("costs", [FLAT, FLOORED], ids=["flat", "floored"])
def test_noise_moves_the_fit_by_less_than_itself(costs: StepCosts) -> None:
    fitted = fit(samples(costs, 0.05))
    errors = error_summary(fitted, samples(costs, 0.0))
    assert errors["p50"] < 0.02
    assert errors["p95"] < 0.08


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be fitted"):
        fit(samples(FLAT, 0.0)[:4])


def test_non_negative_least_squares_meets_its_conditions() -> None:
    randomness = np.random.default_rng(0)
    matrix, wanted = randomness.normal(size=(40, 5)), randomness.normal(size=40)
    solution = non_negative(matrix, wanted)
    gradient = matrix.T @ (matrix @ solution - wanted)
    assert (solution >= 0).all()
    assert (gradient > -1e-6).all()  # no coefficient would help by growing
    assert np.abs(gradient * solution).max() < 1e-6  # nor by shrinking


def test_deviations_and_residuals_are_what_was_put_in() -> None:
    noisy = samples(FLAT, 0.05)
    spread = deviations(noisy)
    assert spread == sorted(spread)
    assert spread[4] == pytest.approx(0.935, abs=0.02)
    assert spread[-5] == pytest.approx(1.065, abs=0.02)
    assert residuals(FLAT, samples(FLAT, 0.0)) == pytest.approx([1.0] * 41)


def test_quantiles_are_evenly_spaced() -> None:
    assert quantiles(range(101), 5) == [0, 25, 50, 75, 100]
    assert quantiles([3.0], 4) == [3.0] * 4


def test_the_shape_of_a_plan_counts_what_fills_its_graph_up() -> None:
    chunk = Row(item=1, slot=0, start=0, count=20, new_blocks=(), max_new=1)
    shape = shape_of(StepPlan(step=1, engine="m", rows=(chunk,), graph_tokens=32))
    assert shape == StepShape(rows=1, tokens=32, prompt_pairs=210.0)


def test_the_shape_of_a_plan_counts_decodes_apart() -> None:
    decode = Row(item=1, slot=0, start=9, count=1, new_blocks=(), max_new=1)
    chunk = Row(item=2, slot=1, start=4, count=3, new_blocks=(), max_new=0)
    shape = shape_of(StepPlan(step=1, engine="m", rows=(decode, chunk)))
    assert shape == StepShape(rows=2, tokens=4, decode_pairs=10, prompt_pairs=5 + 6 + 7, prompt_start=4)
