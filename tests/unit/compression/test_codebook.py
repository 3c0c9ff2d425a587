from __future__ import annotations

import pytest
import torch

from compression.quantize.base import LayerInputs, Scheme
from compression.quantize.codebook import KMeans, place_levels
from compression.quantize.gptq import Gptq
from compression.quantize.rounding import RoundToNearest
from compression.quantize.scale_fit import fit_scale
from tests.unit.compression.test_quantizers import correlated, error, seen, weight

CODEBOOK = Scheme("codebook", bits=4, group_size=32)
INTEGER = Scheme("integer", bits=4, group_size=32)


def mean_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).square().mean())


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group", [32, 64])
def test_without_inputs_it_is_nearer_than_an_even_grid(bits: int, group: int) -> None:
    w = weight(256, 128)
    matrix = KMeans().quantize(w, None, Scheme("codebook", bits=bits, group_size=group))
    grid = Scheme("integer", bits=bits, group_size=group, symmetric=False)
    even = RoundToNearest().quantize(w, None, grid)
    assert mean_error(matrix.dequantize(), w) < 0.95 * mean_error(even.dequantize(), w)
    assert int(matrix.codes.max()) < 1 << bits


def test_levels_that_the_weights_have_are_found() -> None:
    true = torch.tensor([-1.0, -0.75, -0.4, -0.1, 0.2, 0.4, 0.65, 0.9])
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 8, (64, 4, 32), generator=generator)
    codes[..., 0] = 0  # each group's largest is at the end
    scale = torch.rand(64, 4, generator=generator) + 0.5
    w = (true[codes] * scale.unsqueeze(-1)).view(64, 128)
    matrix = KMeans().quantize(w, None, Scheme("codebook", bits=3, group_size=32))
    assert float((matrix.dequantize() - w).abs().max()) < 0.01


def test_levels_are_nearer_where_inputs_are_large() -> None:
    w = weight(256, 64).view(256, 2, 32)
    heavy = torch.ones(2, 32)
    heavy[:, :4] = 100.0
    shared, own = (place_levels(w, importance, 2) for importance in (None, heavy))
    assert torch.equal(own.half().float(), own)
    assert bool((own.diff() > 0).all())
    assert not torch.equal(shared, own)


def test_with_inputs_it_beats_gptq_on_the_layers_output() -> None:
    x, w = correlated(400, 64), weight(96, 64)
    inputs = seen(x)
    matrix = KMeans().quantize(w, inputs, CODEBOOK)
    # At equal bytes: zero points would be more.
    assert error(matrix, w, x) < 0.95 * error(Gptq().quantize(w, inputs, INTEGER), w, x)
    assert error(matrix, w, x) < 0.5 * error(KMeans().quantize(w, None, CODEBOOK), w, x)
    assert matrix.scale is not None
    assert torch.equal(matrix.scale, matrix.scale.bfloat16().float())


def test_fitted_scales_bring_the_output_nearer() -> None:
    x, w = correlated(400, 64), weight(24, 64)
    groups, scale = w.view(24, 4, 16), torch.ones(24, 4)
    base = groups.sign()
    hessian = x.t() @ x

    def loss(factor: torch.Tensor) -> float:
        difference = (factor.unsqueeze(-1) * base).view(w.shape) - w
        return float((difference @ hessian * difference).sum())

    fitted = fit_scale(groups, base, scale, hessian, 0.0)
    assert loss(fitted) < 0.5 * loss(scale)
    for nudge in (0.99, 1.01):
        assert loss(fitted) < loss(fitted * nudge)


def test_weight_and_hessian_stay_as_they_are_and_runs_agree() -> None:
    x, w = correlated(400, 64), weight()
    inputs = seen(x)
    before, hessian = w.clone(), inputs.hessian.clone()
    first = KMeans().quantize(w, inputs, CODEBOOK)
    assert torch.equal(w, before)
    assert torch.equal(inputs.hessian, hessian)
    assert torch.equal(KMeans().quantize(w, inputs, CODEBOOK).codes, first.codes)


def test_zeros_constants_and_rows_as_groups() -> None:
    w = weight(4, 64)
    w[0], w[1] = 0.0, 0.5
    for inputs in (None, seen(correlated(100, 64)), LayerInputs(64, hessian=True)):
        values = KMeans().quantize(w, inputs, Scheme("codebook", bits=4)).dequantize()
        assert bool(values.isfinite().all())
        assert float(values[0].abs().max()) < 1e-6
        torch.testing.assert_close(values[1], w[1], atol=0.05, rtol=0)
    zeros = KMeans().quantize(torch.zeros(4, 64), None, CODEBOOK)
    torch.testing.assert_close(zeros.dequantize(), torch.zeros(4, 64), atol=1e-6, rtol=0)


def test_what_cannot_be_quantized_is_refused() -> None:
    w = weight()
    with pytest.raises(ValueError, match="do not divide"):
        KMeans().quantize(w, None, Scheme("codebook", bits=4, group_size=48))
    w[3, 5] = float("inf")
    with pytest.raises(ValueError, match="infinite"):
        KMeans().quantize(w, None, CODEBOOK)
