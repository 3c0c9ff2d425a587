"""Lines of a quantized embedding in the native library: the bits of the definition."""

from __future__ import annotations

import pytest
import torch

from engines.kernels import IntegerMatrix, backends, dense, embed_quantized, take_rows
from engines.kernels.native import Native


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "width", "group"), [(8, 576, 576), (4, 96, 32), (8, 90, 45), (4, 40, 5)])
def test_lines_are_those_of_the_dequantized_table(
    native: Native, bits: int, width: int, group: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "native", native)
    codes = torch.randint(0, 1 << bits, (60, width), dtype=torch.uint8)
    table = IntegerMatrix(codes, bits, torch.randn(60, width // group))
    for ids in (torch.randint(0, 60, (70,)), torch.tensor([59])):
        assert torch.equal(embed_quantized(ids, table, dtype), dense(take_rows(table, ids), dtype))


def test_an_id_that_the_table_does_not_have_gives_zeros(native: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "native", native)
    table = IntegerMatrix(torch.randint(0, 256, (9, 32), dtype=torch.uint8), 8, torch.rand(9, 1) + 1)
    lines = embed_quantized(torch.tensor([-1, 9, 3, 1 << 40]), table, torch.float32)
    assert lines[[0, 1, 3]].count_nonzero() == 0
    assert torch.equal(lines[2], table.dequantize()[3])


def test_tables_and_ids_of_other_kinds_are_left_to_torch(native: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "native", native)
    codes, ids = torch.randint(0, 256, (9, 32), dtype=torch.uint8), torch.tensor([8, 0, 3])
    plain, scale = IntegerMatrix(codes, 8, torch.rand(9, 4)), torch.rand(9, 4)
    cases = [
        (ids, IntegerMatrix(codes, 8, scale, torch.randn(9, 4)), torch.float32),
        (ids, IntegerMatrix(codes, 8, scale, order=torch.randperm(32)), torch.float32),
        (ids, IntegerMatrix(codes.T.contiguous().T, 8, scale), torch.float32),
        (ids, plain, torch.float16),
        (ids.int(), plain, torch.float32),
    ]
    for given, table, dtype in cases:
        assert torch.equal(embed_quantized(given, table, dtype), table.dequantize()[ids].to(dtype))
    strided = torch.tensor([8, -1, 0, -1, 3])[::2]
    assert torch.equal(embed_quantized(strided, plain, torch.float32), plain.dequantize()[ids])
