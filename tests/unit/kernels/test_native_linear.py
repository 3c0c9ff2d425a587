"""The native matrix product: right, and the same bits for a row in every batch."""

from __future__ import annotations

import math

import pytest
import torch

from engines.kernels.native import Native

SHAPES = [(576, 960), (64, 37), (80, 33), (1, 1), (17, 70), (512, 32)]


def random_weight(depth: int, columns: int) -> torch.Tensor:
    return torch.randn(columns, depth) / math.sqrt(depth)


@pytest.mark.parametrize(("depth", "columns"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_the_product_in_every_batch_size(native: Native, depth: int, columns: int, with_bias: bool) -> None:
    weight, bias = random_weight(depth, columns), torch.randn(columns) if with_bias else None
    panels = native.pack_panels(weight)
    for rows in (1, 2, 3, 5, 6, 7, 11, 12, 13, 25, 130):
        x = torch.randn(rows, depth)
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        torch.testing.assert_close(native.linear(x, panels, columns, bias).double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("depth", "columns"), [(576, 96), (100, 45)])
def test_a_row_has_the_same_bits_in_every_batch_and_on_every_number_of_threads(
    native: Native, depth: int, columns: int
) -> None:
    panels, bias = native.pack_panels(random_weight(depth, columns)), torch.randn(columns)
    x = torch.randn(40, depth)
    whole = native.linear(x, panels, columns, bias)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in range(1, 41):
            chosen = torch.randperm(40)[:rows]
            assert torch.equal(native.linear(x[chosen], panels, columns, bias), whole[chosen])


def test_linear_reads_rows_that_lie_apart_and_takes_none(native: Native) -> None:
    weight, wide = random_weight(48, 50), torch.randn(9, 100)
    panels = native.pack_panels(weight)
    x = wide[:, 20:68]
    assert torch.equal(native.linear(x, panels, 50, None), native.linear(x.contiguous(), panels, 50, None))
    assert torch.equal(native.linear(x[4:5], panels, 50, None), native.linear(x.contiguous()[4:5], panels, 50, None))
    assert native.linear(x[:0], panels, 50, None).shape == (0, 50)


def test_a_strided_weight_is_packed_like_a_plain_one(native: Native) -> None:
    wide = torch.randn(40, 64)
    assert torch.equal(native.pack_panels(wide[:, 8:40]), native.pack_panels(wide[:, 8:40].contiguous()))
    panels = native.pack_panels(wide)
    beyond = panels.transpose(1, 2).reshape(-1, 64)
    assert torch.equal(beyond[:40], wide)
    assert not beyond[40:].any()
