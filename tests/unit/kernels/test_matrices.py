"""Quantized matrices: what their values are, and what a layer of them computes."""

from __future__ import annotations

import pytest
import torch

from engines import kernels
from engines.kernels import CodebookMatrix, Float8Matrix, IntegerMatrix, Matrix, QuantizedMatrix

OUT, WIDTH, GROUPS = 10, 24, 3


def integer_matrix(bits: int = 4, symmetric: bool = False, ordered: bool = False, out: int = OUT) -> IntegerMatrix:
    return IntegerMatrix(
        codes=torch.randint(0, 2**bits, (out, WIDTH), dtype=torch.uint8),
        bits=bits,
        scale=torch.rand(out, GROUPS) + 0.1,
        offset=None if symmetric else torch.randn(out, GROUPS),
        order=torch.randperm(WIDTH) if ordered else None,
    )


def float8_matrix() -> Float8Matrix:
    return Float8Matrix(torch.randn(OUT, WIDTH).to(torch.float8_e4m3fn), torch.rand(3, 2) + 0.1, (4, 16))


def codebook_matrix() -> CodebookMatrix:
    return CodebookMatrix(torch.randint(0, 8, (OUT, WIDTH), dtype=torch.uint8), 3, torch.randn(OUT, GROUPS, 8))


def shared_levels() -> CodebookMatrix:
    codes = torch.randint(0, 8, (OUT, WIDTH), dtype=torch.uint8)
    return CodebookMatrix(codes, 3, torch.randn(1, 1, 8).expand(OUT, 1, 8), scale=torch.randn(OUT, GROUPS))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of all values together: implementations may round a layer's input to 8 bits."""
    return float((found - expected).norm() / expected.norm())


def test_integer_values_follow_the_definition() -> None:
    matrix = integer_matrix(ordered=True)
    assert matrix.order is not None
    assert matrix.offset is not None
    values = matrix.dequantize()
    for row in range(OUT):
        for column in range(WIDTH):
            group = column // matrix.group_size
            expected = matrix.codes[row, column] * matrix.scale[row, group] + matrix.offset[row, group]
            assert values[row, matrix.order[column]] == pytest.approx(float(expected), rel=1e-6)


def test_symmetric_codes_are_centred() -> None:
    matrix = integer_matrix(bits=8, symmetric=True)
    assert torch.equal(matrix.dequantize()[:, :8], (matrix.codes[:, :8].float() - 128) * matrix.scale[:, :1])


def test_float8_blocks_may_be_cut_at_the_edge() -> None:
    matrix = float8_matrix()
    assert matrix.dequantize()[9, 20] == matrix.codes[9, 20].float() * matrix.scale[2, 1]


def test_codebook_values_are_looked_up() -> None:
    matrix = codebook_matrix()
    assert matrix.dequantize()[2, 9] == matrix.codebook[2, 1, int(matrix.codes[2, 9])]
    scaled = shared_levels()
    assert scaled.scale is not None
    assert scaled.group_size == 8
    assert scaled.dequantize()[2, 9] == scaled.codebook[2, 0, int(scaled.codes[2, 9])] * scaled.scale[2, 1]


@pytest.mark.parametrize(
    "matrix",
    [integer_matrix(), integer_matrix(ordered=True), float8_matrix(), codebook_matrix(), shared_levels()],
)
def test_a_layer_computes_the_product_with_the_dequantized_weight(matrix: QuantizedMatrix) -> None:
    x, bias = torch.randn(5, WIDTH), torch.randn(OUT)
    result = kernels.linear(x, kernels.pack_linear(matrix), bias)
    assert distance(result, x @ matrix.dequantize().T + bias) < 0.02


@pytest.mark.parametrize(
    "parts",
    [
        [integer_matrix(), integer_matrix(out=4)],
        [integer_matrix(bits=8), integer_matrix(bits=4), torch.randn(6, WIDTH)],
        [float8_matrix(), codebook_matrix()],
        [shared_levels(), shared_levels()],
        [shared_levels(), codebook_matrix()],
        [integer_matrix(ordered=True), integer_matrix(ordered=True)],
    ],
)
def test_parts_of_any_formats_stand_side_by_side(parts: list[Matrix]) -> None:
    x = torch.randn(5, WIDTH)
    packed = kernels.pack_linear(*parts)
    assert packed.out_features == sum(part.shape[0] for part in parts)
    expected = torch.cat([x @ kernels.dense(part, torch.float32).T for part in parts], dim=1)
    assert distance(kernels.linear(x, packed), expected) < 0.02


def test_activations_are_rounded_token_by_token() -> None:
    x = torch.randn(3, WIDTH) * torch.tensor([[1.0], [100.0], [0.0]])
    matrix = IntegerMatrix(
        torch.randint(0, 256, (OUT, WIDTH), dtype=torch.uint8), 8, torch.rand(OUT, 1), None, None, "int8"
    )
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    expected = (x / scale).round() * scale @ matrix.dequantize().T
    torch.testing.assert_close(kernels.linear(x, kernels.pack_linear(matrix)), expected, rtol=1e-4, atol=1e-3)
