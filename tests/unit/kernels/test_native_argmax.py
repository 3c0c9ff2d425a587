"""The native search for each row's largest value."""

from __future__ import annotations

import pytest
import torch

from engines.kernels.native import Native


@pytest.mark.parametrize("width", [1, 5, 16, 37, 1000])
def test_argmax_is_the_first_largest(native: Native, width: int) -> None:
    values = torch.randn(50, width + 3).mul(3).round()[:, :width]
    expected = (values == values.amax(1, keepdim=True)).int().argmax(1)
    assert torch.equal(native.argmax(values), expected)


def test_a_row_without_numbers_gets_some_place(native: Native) -> None:
    values = torch.stack([torch.full((40,), float("nan")), torch.full((40,), float("-inf")), torch.randn(40)])
    values[2, 3] = float("nan")
    values[2, 39] = float("inf")
    places = native.argmax(values)
    assert 0 <= int(places[0]) < 40
    assert 0 <= int(places[1]) < 40
    assert int(places[2]) == 39
