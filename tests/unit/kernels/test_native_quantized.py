"""Products with quantized weights in the native library: right, whatever the format, and the same bits for a row in
every batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engines.kernels import (
    CodebookMatrix,
    Float8Matrix,
    Fusion,
    IntegerMatrix,
    QuantizedMatrix,
    RmsNorm,
    backends,
    compose_output,
    linear,
    quantized_product,
)
from engines.kernels.native import Native
from engines.kernels.quantized import PlainQuantized, pack_quantized
from engines.kernels.quantized_cpu import ACTIVATION_BLOCK, NativeQuantized

ROWS = (1, 2, 3, 5, 11, 12, 13, 25, 70)


@pytest.fixture(autouse=True)
def only_native(native: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    """``pack_quantized`` and ``linear`` use the variant under test."""
    monkeypatch.setattr(backends, "native", native)


def integers(
    out: int, width: int, group: int, bits: int, symmetric: bool = True, dtype: torch.dtype = torch.float16
) -> IntegerMatrix:
    """Random codes whose values are about as large as trained weights' are."""
    groups = width // group
    scale = ((torch.rand(out, groups) + 0.5) * 4 / 2**bits / width**0.5).to(dtype).float()
    offset = None if symmetric else (-scale * (2**bits) * torch.rand(out, groups)).to(dtype).float()
    return IntegerMatrix(torch.randint(0, 2**bits, (out, width), dtype=torch.uint8), bits, scale, offset)


def blockwise(x: torch.Tensor, block: int) -> torch.Tensor:
    """The rounding of weight-only formats' activations, defined: 8 bits, one scale for each ``block`` features."""
    blocks = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % block)).view(x.shape[0], -1, block)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return ((blocks / scale).round() * scale).flatten(1)[:, : x.shape[1]]


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def native_of(matrix: QuantizedMatrix) -> NativeQuantized:
    packed = pack_quantized(matrix)
    assert isinstance(packed, NativeQuantized)
    return packed


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize(("out", "width", "group"), [(70, 192, 64), (33, 96, 32), (64, 256, 128), (7, 100, 100)])
def test_a_weight_only_product_is_that_of_block_wise_rounded_activations(
    out: int, width: int, group: int, bits: int, symmetric: bool
) -> None:
    matrix = integers(out, width, group, bits, symmetric)
    packed = native_of(matrix)
    for rows in ROWS:
        x = torch.randn(rows, width)
        expected = blockwise(x, packed.codes.block).double() @ matrix.dequantize().double().t()
        assert distance(packed.product(x, None), expected) < 1e-6
        assert distance(packed.product(x, None), quantized_product(x, matrix, None)) < 0.02


@pytest.mark.parametrize(("width", "group"), [(192, 192), (192, 48), (90, 90)])
@pytest.mark.parametrize("fixed", [None, 0.03])
def test_a_product_with_int8_activations_is_its_definition(width: int, group: int, fixed: float | None) -> None:
    matrix = replace(
        integers(40, width, group, 8), activations="int8", input_scale=None if fixed is None else torch.tensor(fixed)
    )
    x = torch.randn(20, width) * torch.linspace(0.1, 3, 20).unsqueeze(1)
    assert distance(native_of(matrix).product(x, None), quantized_product(x, matrix, None)) < 1e-3


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float16, 1.0), (torch.bfloat16, 2.0**40), (torch.float32, 1.0)])
def test_scales_are_kept_in_16_bits_only_where_that_is_exact(dtype: torch.dtype, factor: float) -> None:
    matrix = integers(64, 128, 64, 4, symmetric=False, dtype=dtype)
    assert matrix.offset is not None
    matrix = replace(matrix, scale=matrix.scale * factor, offset=matrix.offset * factor)
    packed = native_of(matrix)
    assert packed.codes.scale.dtype is dtype
    x = torch.randn(3, 128)
    assert distance(packed.product(x, None), blockwise(x, 64) @ matrix.dequantize().t()) < 1e-6


@pytest.mark.parametrize("matrix", [integers(64, 192, 64, 4), integers(70, 90, 90, 8, symmetric=False)])
def test_a_row_has_the_same_bits_in_every_batch_and_on_every_number_of_threads(matrix: IntegerMatrix) -> None:
    packed = native_of(matrix)
    x = torch.randn(40, matrix.shape[1])
    fusion = Fusion(norm=RmsNorm(torch.rand(matrix.shape[1]), 1e-5))
    whole = linear(x, packed, None, fusion)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in range(1, 41, 3):
            chosen = torch.randperm(40)[:rows]
            assert torch.equal(linear(x[chosen], packed, None, fusion), whole[chosen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out", [256, 100])
def test_norm_bias_gating_residual_and_type_are_those_of_single_operations(dtype: torch.dtype, out: int) -> None:
    matrix = integers(out, 160, 32, 4)
    packed = native_of(matrix)
    wide = torch.full((7, 200), float("nan"), dtype=dtype)
    wide[:, :160] = torch.randn(7, 160)
    x, residual = wide[:, :160], torch.randn(7, out // 2 + 4).to(dtype)[:, : out // 2]
    norm, bias = RmsNorm(torch.rand(160).to(dtype), 1e-5), torch.randn(out).to(dtype)
    for fusion in (
        Fusion(norm=norm),
        Fusion(norm=norm, gated=True),
        Fusion(gated=True, residual=residual),
        Fusion(norm=norm, gated=True, residual=residual, dtype=torch.float32),
    ):
        result = linear(x, packed, bias, fusion)
        normed = x if fusion.norm is None else norm(x)
        product = blockwise(normed, packed.codes.block) @ matrix.dequantize().t() + bias.float()
        expected = compose_output(
            product, replace(fusion, residual=None if fusion.residual is None else residual.float())
        )
        assert result.dtype is (fusion.dtype or dtype)
        assert distance(result, expected) < (2e-6 if dtype is torch.float32 else 1e-2)


def test_a_row_that_is_not_finite_is_not_finite_in_the_output_and_spoils_no_other() -> None:
    matrix = integers(64, 128, 64, 4)
    packed = native_of(matrix)
    x = torch.randn(3, 128)
    clean = packed.product(x, None)
    x[0, 5], x[2, 100] = float("nan"), float("inf")
    result = packed.product(x, None)
    assert not result[[0, 2]].isfinite().any()
    assert torch.equal(result[1], clean[1])


def test_rows_of_zeros_and_no_rows() -> None:
    matrix = integers(64, 128, 64, 4, symmetric=False)
    packed = native_of(matrix)
    assert not packed.product(torch.zeros(2, 128), None).any()
    assert packed.product(torch.empty(0, 128), None).shape == (0, 64)


def test_columns_sorted_by_group_take_their_own_features() -> None:
    matrix = replace(integers(40, 128, 32, 4), order=torch.randperm(128))
    packed = native_of(matrix)
    x, norm = torch.randn(5, 128), RmsNorm(torch.rand(128), 1e-5)
    assert distance(linear(x, packed, None, Fusion(norm=norm)), norm(x) @ matrix.dequantize().t()) < 0.01


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_codebook_is_rounded_to_8_bits_of_its_largest_level(bits: int, scaled: bool) -> None:
    book, scale = torch.randn(40, 1 if scaled else 2, 2**bits), torch.randn(40, 4) if scaled else None
    matrix = CodebookMatrix(torch.randint(0, 2**bits, (40, 128), dtype=torch.uint8), bits, book, scale=scale)
    x = torch.randn(9, 128)
    assert distance(native_of(matrix).product(x, None), x @ matrix.dequantize().t()) < 0.01


def test_what_the_library_cannot_multiply_runs_as_defined() -> None:
    odd = integers(20, 90, 45, 8)
    floats = Float8Matrix(torch.randn(16, 32).to(torch.float8_e4m3fn), torch.ones(1, 1), (16, 32))
    for matrix in (odd, floats):
        packed = pack_quantized(matrix)
        assert isinstance(packed, PlainQuantized)
        x = torch.randn(3, matrix.shape[1])
        assert torch.equal(linear(x, packed), quantized_product(x, matrix, None))


def test_activations_share_a_scale_within_a_group_of_weights() -> None:
    for group, block in ((32, 32), (64, 64), (96, 48), (128, 64), (576, 64)):
        packed = native_of(integers(32, 1152, group, 4))
        assert packed.codes.block == block <= ACTIVATION_BLOCK
