"""Codes as a stream of bits, against Python's integers."""

from __future__ import annotations

import pytest
import torch

from engines.quant.packing import pack_codes, packed_bytes, unpack_codes


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("columns", [1, 7, 8, 33, 96])
@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_streams_of_bits(bits: int, columns: int, align: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, columns), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack_codes(codes, bits, align)
    assert packed.shape == (3, packed_bytes(columns, bits, align))
    for row, stream in zip(codes.tolist(), packed.tolist(), strict=True):
        whole = sum(code << place * bits for place, code in enumerate(row))
        assert bytes(stream) == whole.to_bytes(len(stream), "little")
    assert torch.equal(unpack_codes(packed, bits, columns), codes)
    if align == 4:
        assert torch.equal(unpack_codes(packed.view(torch.int32), bits, columns), codes)
