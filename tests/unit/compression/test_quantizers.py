from __future__ import annotations

import pytest
import torch

from compression.quantize import gptq
from compression.quantize.base import LayerInputs, Scheme
from compression.quantize.gptq import Gptq, inverse_factor
from compression.quantize.rounding import RoundToNearest
from engines.kernels import IntegerMatrix, dense

INT4 = Scheme("integer", bits=4, group_size=16, symmetric=False)


def correlated(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Inputs whose features depend on each other, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    mix += torch.randn(1, width, generator=generator)
    inputs: torch.Tensor = torch.randn(rows, width, generator=generator) @ mix
    return inputs


def seen(x: torch.Tensor) -> LayerInputs:
    inputs = LayerInputs(x.shape[1], hessian=True, samples=32)
    for part in torch.split(x, 50):
        inputs.observe(part)
    return inputs


def weight(rows: int = 24, width: int = 64) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(9))


def error(matrix: object, w: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (dense(matrix, torch.float32) - w).t()).square().mean())  # type: ignore[arg-type]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 16), (3, 32), (2, 64)])
def test_rounding_is_within_half_a_step_or_cut_off(bits: int, group: int | None, symmetric: bool) -> None:
    w = weight()
    scheme = Scheme("integer", bits=bits, group_size=group, symmetric=symmetric)
    matrix = RoundToNearest().quantize(w, None, scheme)
    assert isinstance(matrix, IntegerMatrix)
    assert int(matrix.codes.max()) < 1 << bits
    assert torch.equal(matrix.scale, matrix.scale.bfloat16().float())
    inner = (matrix.codes > 0) & (matrix.codes < (1 << bits) - 1)
    step = matrix.scale.repeat_interleave(matrix.group_size, 1)
    difference = (matrix.dequantize() - w).abs()
    assert bool((difference <= step * 0.5001)[inner].all())


@pytest.mark.parametrize("block", [None, (16, 16), (10, 48)])
def test_float8_keeps_three_bits_of_mantissa(block: tuple[int, int] | None) -> None:
    w = weight()
    matrix = RoundToNearest().quantize(w, None, Scheme("float8", block=block, symmetric=True))
    difference = (dense(matrix, torch.float32) - w).abs()
    assert bool((difference <= w.abs() * 2**-4 + w.abs().max() * 2**-9).all())


def test_gptq_beats_rounding_on_the_layers_output() -> None:
    x, w = correlated(400, 64), weight()
    inputs = seen(x)
    plain = error(RoundToNearest().quantize(w, inputs, INT4), w, x)
    assert error(Gptq().quantize(w, inputs, INT4), w, x) < 0.5 * plain


def test_scales_are_fitted_to_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = correlated(400, 64), weight()
    fitted = Gptq().quantize(w, seen(x), INT4)
    assert torch.equal(fitted.scale, fitted.scale.bfloat16().float())
    monkeypatch.setattr(gptq, "fit_scale", lambda weight, base, scale, hessian, damping: scale)
    assert error(fitted, w, x) < 0.9 * error(Gptq().quantize(w, seen(x), INT4), w, x)


def test_a_scale_that_would_turn_around_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = correlated(400, 64), weight()
    monkeypatch.setattr(gptq, "fit_scale", lambda weight, base, scale, hessian, damping: -scale)
    assert bool((Gptq().quantize(w, seen(x), INT4).scale > 0).all())


def test_gptq_leaves_the_weight_and_the_hessian_as_they_are() -> None:
    x, w = correlated(400, 64), weight()
    inputs = seen(x)
    before, hessian = w.clone(), inputs.hessian.clone()
    first = Gptq().quantize(w, inputs, INT4)
    assert torch.equal(w, before)
    assert torch.equal(inputs.hessian, hessian)
    assert torch.equal(Gptq().quantize(w, inputs, INT4).codes, first.codes)


def test_channels_without_input_or_with_a_constant_one_are_rounded_all_the_same() -> None:
    x, w = correlated(400, 64), weight()
    x[:, 3], x[:, 40] = 0.0, 7.0
    matrix = Gptq().quantize(w, seen(x), INT4)
    assert bool(matrix.dequantize().isfinite().all())
    assert float((matrix.dequantize()[:, 3] - w[:, 3]).abs().max()) < 2 * float(matrix.scale.max())


def test_fewer_tokens_than_channels_are_enough() -> None:
    x, w = correlated(8, 64), weight()
    matrix = Gptq().quantize(w, seen(x), INT4)
    assert error(matrix, w, x) < error(RoundToNearest().quantize(w, None, INT4), w, x)


def test_no_input_at_all_is_plain_rounding() -> None:
    inputs = seen(torch.zeros(10, 64))
    assert torch.equal(inverse_factor(inputs.hessian, torch.arange(64), 0.01), torch.eye(64))
    assert bool(Gptq().quantize(weight(), inputs, INT4).dequantize().isfinite().all())


@pytest.mark.parametrize("quantizer", [Gptq(), RoundToNearest()])
def test_a_weight_with_nan_is_refused(quantizer: Gptq | RoundToNearest) -> None:
    w = weight()
    w[3, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        quantizer.quantize(w, seen(correlated(100, 64)), INT4)


def test_a_constant_row_and_a_row_of_zeros_come_out_as_they_are() -> None:
    w = torch.zeros(2, 64)
    w[1] = 0.5
    matrix = RoundToNearest().quantize(w, None, INT4)
    torch.testing.assert_close(matrix.dequantize(), w, atol=2e-3, rtol=0)


def test_inputs_are_summed_up() -> None:
    x = correlated(200, 12)
    inputs = seen(x)
    torch.testing.assert_close(inputs.hessian, x.t() @ x)
    torch.testing.assert_close(inputs.mean_abs, x.abs().mean(0))
    torch.testing.assert_close(inputs.mean_square, x.square().mean(0))
    assert inputs.tokens == 200
    assert 32 <= inputs.samples.shape[0] <= 64
    scale = torch.linspace(0.5, 2, 12)
    inputs.divide(scale)
    torch.testing.assert_close(inputs.hessian, (x / scale).t() @ (x / scale))
    torch.testing.assert_close(inputs.mean, (x / scale).mean(0))
    torch.testing.assert_close(inputs.mean_square, (x / scale).square().mean(0))


def test_inputs_with_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        LayerInputs(4).observe(torch.full((2, 4), float("nan")))


def test_a_static_input_scale_covers_what_was_seen() -> None:
    x = correlated(100, 64)
    scheme = Scheme("integer", activations="int8", static_input=True)
    matrix = RoundToNearest().quantize(weight(), seen(x), scheme)
    assert isinstance(matrix, IntegerMatrix)
    assert matrix.input_scale is not None
    torch.testing.assert_close(matrix.input_scale * 127, x.abs().max(), rtol=5e-3, atol=0)
    with pytest.raises(ValueError, match="calibration"):
        RoundToNearest().quantize(weight(), None, scheme)
