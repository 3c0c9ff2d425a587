"""The kernels of quantized weights against their definition, through Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from tests.triton_interpreter import DEVICE

pytest.importorskip("triton")

from engines.kernels import CodebookMatrix, QuantizedMatrix
from engines.kernels.cuda.quantized import dequantized_product, quantized_linear
from engines.kernels.cuda.quantized_layout import BYTES, HALVES, OFFSET, ZERO_POINT, device_codes
from engines.kernels.cuda.quantized_rows import dequantize_lines, round_rows, scale_sums
from engines.kernels.cuda.quantized_tuning import QuantizedConfig
from engines.kernels.quantized import round_activations
from tests.quantized_cases import distance, exact_product, float8, integers, levels

NARROW = QuantizedConfig(block_n=16, parts=4, splits=1, warps=4, stages=2, prefetch=0, early=False)
SPLIT = QuantizedConfig(block_n=32, parts=4, splits=3, warps=4, stages=3, prefetch=0, early=False)
WIDE = QuantizedConfig(block_n=64, parts=0, splits=1, warps=4, stages=3, prefetch=0, early=False)
WIDE_SPLIT = QuantizedConfig(block_n=64, parts=0, splits=2, warps=4, stages=3, prefetch=0, early=False)
CONFIGS = [NARROW, SPLIT, WIDE, WIDE_SPLIT]
EXACT, ROUNDED = 2e-6, 6e-3
"""Of products whose weights are kept as they are, and of levels, which become bfloat16."""


def matrices() -> list[QuantizedMatrix]:
    """Odd sizes; rows that their units do not fill; groups of every width."""
    return [
        integers(40, 200, 4, device=DEVICE),
        integers(24, 384, 4, 128, device=DEVICE),
        integers(33, 320, 4, 64, "zeros", device=DEVICE),
        integers(17, 352, 4, 32, "any", device=DEVICE),
        integers(20, 288, 4, 96, exact=False, device=DEVICE),
        integers(24, 240, 4, 48, "zeros", device=DEVICE),
        integers(18, 136, 3, device=DEVICE),
        integers(20, 256, 2, 64, "zeros", device=DEVICE),
        integers(40, 200, 8, device=DEVICE),
        integers(24, 384, 8, 128, device=DEVICE),
        integers(33, 320, 8, 64, "zeros", device=DEVICE),
        integers(16, 96, 6, 16, "any", device=DEVICE),
        integers(40, 200, 8, 0, "zeros", device=DEVICE),
        float8(40, 200, (40, 200), device=DEVICE),
        float8(24, 304, (1, 304), device=DEVICE),
        float8(200, 320, (128, 128), device=DEVICE),
        levels(40, 200, 4, device=DEVICE),
        levels(24, 384, 3, books=3, device=DEVICE),
        levels(18, 256, 4, groups=4, device=DEVICE),
    ]


def tolerance(matrix: QuantizedMatrix) -> float:
    return ROUNDED if isinstance(matrix, CodebookMatrix) else EXACT


def inputs(rows: int, depth: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """(rows, depth), NaN behind the end of each row."""
    wide = torch.full((rows, depth + 16), float("nan"), dtype=dtype, device=DEVICE)
    wide[:, :depth] = torch.randn(rows, depth)
    return wide[:, :depth]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("index", range(len(matrices())))
def test_products(config: QuantizedConfig, index: int) -> None:
    matrix = matrices()[index]
    codes = device_codes(matrix)
    assert codes is not None
    x = inputs((1, 3, 8, 21)[index % 4], matrix.shape[1])
    first = quantized_linear(x, codes, config, dtype=torch.float32)
    assert distance(first, exact_product(x, matrix)) < tolerance(matrix)
    # The programs that share a tile leave their counters as they found them.
    assert torch.equal(quantized_linear(x, codes, config, dtype=torch.float32), first)


@pytest.mark.parametrize("index", range(len(matrices())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_lines(index: int, dtype: torch.dtype) -> None:
    matrix = matrices()[index]
    codes = device_codes(matrix)
    assert codes is not None
    lines = torch.full((9, matrix.shape[1]), torch.nan, dtype=dtype, device=DEVICE)
    dequantize_lines(codes, 5, lines)
    expected = matrix.dequantize()[5:14].double()
    least = 1e-6 if dtype is torch.float32 else 4e-3
    assert distance(lines, expected) < max(least, tolerance(matrix) if tolerance(matrix) > EXACT else 0)
    x = inputs(3, matrix.shape[1]).to(dtype)
    assert distance(dequantized_product(x, codes), exact_product(x, matrix)) < 1.2e-2


@pytest.mark.parametrize("index", range(len(matrices())))
def test_float16(index: int) -> None:
    matrix = matrices()[index]
    codes = device_codes(matrix)
    assert codes is not None
    x = inputs(5, matrix.shape[1], torch.float16)
    result = quantized_linear(x, codes, NARROW, dtype=torch.float32)
    assert distance(result, exact_product(x, matrix)) < tolerance(matrix)


@pytest.mark.parametrize("rows", [129, 130])
def test_several_tiles_of_rows(rows: int) -> None:
    matrix = integers(72, 256, 4, 128, "zeros", device=DEVICE)
    codes = device_codes(matrix)
    assert codes is not None
    x = inputs(rows, 256)
    assert distance(quantized_linear(x, codes, WIDE, dtype=torch.float32), exact_product(x, matrix)) < EXACT


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("gated", [False, True])
def test_what_follows_the_product(config: QuantizedConfig, gated: bool) -> None:
    matrix = integers(72, 320, 4, 64, device=DEVICE)
    codes = device_codes(matrix)
    assert codes is not None
    x, bias = inputs(5, 320), torch.randn(72).to(DEVICE, torch.bfloat16)
    residual = inputs(5, 36 if gated else 72)
    expected = exact_product(x, matrix) + bias.double()
    if gated:
        gate, up = expected.chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up
    result = quantized_linear(x, codes, config, None, bias, gated, residual)
    assert result.dtype is torch.bfloat16
    assert distance(result, expected + residual.double()) < 8e-3
    wanted = torch.full_like(result, torch.nan)
    assert quantized_linear(x, codes, config, None, bias, gated, residual, into=wanted) is wanted
    assert torch.equal(wanted, result)


@pytest.mark.parametrize("float8_codes", [False, True])
@pytest.mark.parametrize("fixed", [None, 0.02])
def test_rows_are_rounded_as_the_definition_says(float8_codes: bool, fixed: float | None) -> None:
    matrix = integers(8, 200, 8, activations="float8" if float8_codes else "int8", device=DEVICE)
    x = inputs(7, 200)
    x[3] = 0
    scale = None if fixed is None else torch.tensor(fixed, device=DEVICE)
    codes, row_scale = round_rows(x, float8_codes, scale, 256, torch.bfloat16)
    assert not codes[:, 200:].any()
    if fixed is not None:
        object.__setattr__(matrix, "input_scale", scale)
    expected = round_activations(x.float(), matrix)
    torch.testing.assert_close(codes[:, :200].float() * row_scale[:, None], expected, rtol=1e-6, atol=1e-7)
    narrow, _ = round_rows(x, float8_codes, scale, 256, torch.float8_e4m3fn if float8_codes else torch.int8)
    assert torch.equal(narrow.bfloat16(), codes)


def test_rows_are_rounded_after_their_norm() -> None:
    x, gain = inputs(4, 300), (torch.rand(300) + 0.5).to(DEVICE, torch.bfloat16)
    normed = torch.nn.functional.rms_norm(x.float(), (300,), gain.float(), 1e-6)
    codes, row_scale = round_rows(x, False, None, 304, torch.bfloat16, (gain, 1e-6))
    assert distance(codes[:, :300].float() * row_scale[:, None], normed.double()) < 1e-2


@pytest.mark.parametrize("activations", ["int8", "float8"])
def test_products_of_rounded_rows(activations: str) -> None:
    depth = 208
    if activations == "int8":
        matrix: QuantizedMatrix = integers(48, depth, 8, activations="int8", device=DEVICE)
    else:
        matrix = float8(48, depth, (1, depth), "float8", device=DEVICE)
    codes = device_codes(matrix)
    assert codes is not None
    x = inputs(6, depth)
    rounded, row_scale = round_rows(x, activations == "float8", None, codes.padded_depth, torch.bfloat16)
    result = quantized_linear(rounded, codes, NARROW, row_scale, dtype=torch.float32)
    assert distance(result, exact_product(x, matrix)) < EXACT


def test_integer_sums_get_their_scales() -> None:
    sums = torch.randint(-100_000, 100_000, (3, 1500), dtype=torch.int32, device=DEVICE)
    rows, columns = torch.rand(3, device=DEVICE), torch.rand(1500, device=DEVICE)
    expected = sums.double() * rows.double()[:, None] * columns.double()
    assert distance(scale_sums(sums, rows, columns, torch.float32), expected) < 1e-6


def test_layouts() -> None:
    four = device_codes(integers(8, 256, 4, 64, "zeros"))
    assert four is not None
    assert four.scale is not None
    assert (four.format, four.unit, four.offset_kind, four.scale.dtype) == (HALVES, 64, ZERO_POINT, torch.float16)
    assert four.weight_bytes == 8 * (128 + 4 * 2 + 4 + 4)
    inexact = device_codes(integers(8, 256, 4, 64, "any", exact=False))
    assert inexact is not None
    assert inexact.scale is not None
    assert (inexact.offset_kind, inexact.scale.dtype) == (OFFSET, torch.float32)
    narrow = device_codes(integers(8, 96, 4, 48))
    assert narrow is not None
    assert (narrow.format, narrow.unit) == (BYTES, 16), "half a unit of 16 is no matrix instruction"
    assert device_codes(integers(8, 96, 4, 24)) is None
    bfloat16 = integers(8, 256, 4, 64)
    scale = (torch.rand(8, 4) * 1e-8).bfloat16().float()
    object.__setattr__(bfloat16, "scale", scale)
    packed = device_codes(bfloat16)
    assert packed is not None
    assert packed.scale is not None
    assert packed.scale.dtype is torch.float16, "tiny scales of bfloat16 are exact beside a power of two"
    assert torch.equal(packed.scale.t().float() * packed.factor[:, None], scale)
