from __future__ import annotations

import math

import numpy as np
import pytest

from compression.measures.intervals import Estimate, ratio_if_any, ratio_of_sums, share


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    randomness = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        values = randomness.normal(3.0, 1.0, 40)
        estimate = ratio_of_sums(values, np.ones(40))
        assert estimate.low < estimate.value < estimate.high
        hits += estimate.low <= 3.0 <= estimate.high
    assert 0.89 <= hits / 200 <= 0.99


def test_units_weigh_by_their_size_and_the_value_goes_through_the_transform() -> None:
    estimate = ratio_of_sums([2.0, 30.0], [1.0, 10.0], math.exp)
    assert estimate.value == pytest.approx(math.exp(32 / 11))
    assert estimate.low == pytest.approx(math.exp(2.0))
    assert estimate.high == pytest.approx(math.exp(3.0))


def test_a_comparison_of_pairs_is_tighter_than_that_of_its_sides() -> None:
    randomness = np.random.default_rng(2)
    base = randomness.normal(3.0, 1.0, 50)
    own = base + randomness.normal(0.01, 0.001, 50)
    paired, alone = ratio_of_sums(own - base, np.ones(50)), ratio_of_sums(own, np.ones(50))
    assert paired.high - paired.low < 0.01 * (alone.high - alone.low)
    assert paired.low > 0


def test_wilson_s_interval_of_few_trials() -> None:
    none = share(0, 48)
    assert none.value == none.low == 0.0
    assert none.high == pytest.approx(0.0741, abs=1e-4)
    half = share(5, 10)
    assert half.low == pytest.approx(0.2366, abs=1e-4)
    assert half.high == pytest.approx(0.7634, abs=1e-4)
    assert share(7, 7).high == 1.0


def test_nothing_to_count_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        ratio_of_sums([], [])
    with pytest.raises(ValueError, match="at least one"):
        share(0, 0)
    assert ratio_if_any([], []) is ratio_if_any([0.0, 0.0], [0.0, 0.0]) is None
    assert ratio_if_any([1.0], [2.0]) == Estimate(0.5, 0.5, 0.5)
