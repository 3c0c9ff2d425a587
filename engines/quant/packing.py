"""Codes of a few bits as one stream: code ``i`` of a row stands in bits ``i * bits`` and up, least significant first.

compressed-tensors, GPTQ (turned by 90 degrees) and our codebooks share it; they differ in what a row is padded to.
"""

from __future__ import annotations

import torch

PER_UNIT = 8
"""So many codes fill whole bytes, whatever their bits."""


def packed_bytes(columns: int, bits: int, align: int = 1) -> int:
    """Bytes of a row of codes, padded to a multiple of ``align``."""
    return -(-columns * bits // (8 * align)) * align


def pack_codes(codes: torch.Tensor, bits: int, align: int = 1) -> torch.Tensor:
    """(R, C) uint8 codes below ``2 ** bits`` -> (R, ``packed_bytes``) uint8."""
    rows, columns = codes.shape
    units = -(-columns // PER_UNIT)
    padded = torch.nn.functional.pad(codes, (0, units * PER_UNIT - columns)).view(rows, units, PER_UNIT).long()
    shifts = torch.arange(PER_UNIT, device=codes.device) * bits
    # Eight codes of eight bits reach the sign bit, which no sum of disjoint bits overflows.
    words = (padded << shifts).sum(dim=2, keepdim=True)
    stream = (words >> torch.arange(bits, device=codes.device) * 8 & 0xFF).to(torch.uint8).view(rows, units * bits)
    return torch.nn.functional.pad(stream, (0, max(0, packed_bytes(columns, bits, align) - units * bits)))[
        :, : packed_bytes(columns, bits, align)
    ].contiguous()


def unpack_codes(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """(R, bytes) uint8, or int32 words of them -> (R, ``columns``) uint8 codes."""
    stream = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return stream[:, :columns].contiguous()
    if bits == 4:
        halves = torch.stack((stream & 0xF, stream >> 4), dim=2)
        return halves.view(stream.shape[0], -1)[:, :columns].contiguous()
    rows, units = stream.shape[0], -(-columns // PER_UNIT)
    missing = units * bits - stream.shape[1]
    padded = torch.nn.functional.pad(stream, (0, max(0, missing)))[:, : units * bits].reshape(rows, units, bits)
    places = torch.arange(bits, device=stream.device) * 8
    words = (padded.long() << places).sum(dim=2, keepdim=True)
    shifts = torch.arange(PER_UNIT, device=stream.device) * bits
    codes = (words >> shifts & (1 << bits) - 1).to(torch.uint8)
    return codes.view(rows, units * PER_UNIT)[:, :columns].contiguous()


def codes_of_signed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 values of ``bits`` bits -> uint8 codes, ``2 ** (bits - 1)`` more."""
    return values.view(torch.uint8) + (1 << bits - 1) & (1 << bits) - 1
