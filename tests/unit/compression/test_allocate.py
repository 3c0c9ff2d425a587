from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.allocate import least_loss, most_frequent
from compression.errors import CompressionError

pytest.importorskip("scipy", reason="scipy is part of the extra compress")


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    items, formats = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    numbers = st.integers(1, 1000)
    sizes = np.array(draw(st.lists(numbers, min_size=items * formats, max_size=items * formats)))
    losses = np.array(draw(st.lists(numbers, min_size=items * formats, max_size=items * formats)), float) / 1e6
    sizes = sizes.reshape(items, formats)
    least, most = sizes.min(1).sum(), sizes.max(1).sum()
    return losses.reshape(items, formats), sizes, int(draw(st.integers(least, most)))


@given(problems())
@settings(max_examples=50, deadline=None)
def test_no_choice_within_the_budget_has_a_smaller_loss(problem: tuple[np.ndarray, np.ndarray, int]) -> None:
    losses, sizes, budget = problem
    rows = np.arange(len(losses))
    chosen = least_loss(losses, sizes, budget)
    assert sizes[rows, chosen].sum() <= budget
    every = (np.array(choice) for choice in product(range(losses.shape[1]), repeat=len(losses)))
    best = min(losses[rows, choice].sum() for choice in every if sizes[rows, choice].sum() <= budget)
    assert losses[rows, chosen].sum() <= best * (1 + 1e-3)


def test_a_large_model_is_decided_in_seconds() -> None:
    random = np.random.default_rng(3)
    cold = random.lognormal(size=4000)
    losses, sizes = np.stack((cold, cold * 0.01), 1), np.tile([1100, 2050], (4000, 1))
    budget = int(sizes[:, 0].sum() + 0.5 * 950 * 4000)
    chosen = least_loss(losses, sizes, budget)
    order = np.argsort(-cold)
    assert set(np.flatnonzero(chosen)) == set(order[:2000])


def test_the_frequency_rule_takes_the_busiest_that_fit() -> None:
    sizes = np.array([[4, 8], [4, 8], [4, 8]])
    assert most_frequent(np.array([5, 1, 9]), sizes, 12 + 4).tolist() == [0, 0, 1]
    assert most_frequent(np.array([5, 1, 9]), sizes, 12 + 11).tolist() == [1, 0, 1]
    assert most_frequent(np.array([5, 1, 9]), sizes, 12).tolist() == [0, 0, 0]


def test_too_few_bytes_for_the_smallest_formats() -> None:
    sizes = np.array([[4, 8], [4, 8]])
    with pytest.raises(CompressionError, match="8 bytes, more than the 7"):
        least_loss(np.ones((2, 2)), sizes, 7)
    with pytest.raises(CompressionError, match="8 bytes, more than the 7"):
        most_frequent(np.ones(2, np.int64), sizes, 7)
