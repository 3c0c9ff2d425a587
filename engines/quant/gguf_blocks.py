"""The blocks of GGUF files as integer matrices: the same codes, and scales multiplied out to one or two a group.

Layouts as in ggml's ``block_q*`` structures. Types of 5 and 6 bits come out as codes of 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engines.gguf_header import TENSOR_TYPES
from engines.kernels import IntegerMatrix
from engines.quant.base import LinearPart, Split, WeightSource
from engines.quant.share import share_of
from engines.quantization import GgufBlocks

BLOCK_SIZES = {name: (block, size) for name, block, size in TENSOR_TYPES.values()}
MIDDLE = 128
"""The code of 8 bits that stands for 0."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Of all rows: (rows, blocks, ...)."""

    codes: torch.Tensor
    """(rows, blocks, block) uint8."""
    scale: torch.Tensor
    """(rows, blocks, groups) float32."""
    offset: torch.Tensor | None = None
    """As the scale; None: codes are symmetric."""


@dataclass(frozen=True, slots=True)
class GgufMethod:
    """The QuantMethod of a GGUF tensor whose blocks are kept."""

    config: GgufBlocks

    def tensor_names(self, part: LinearPart) -> tuple[str, ...]:
        return (f"{part.name}.weight_blocks",)

    def create_weights(self, part: LinearPart, in_features: int, split: Split, source: WeightSource) -> IntegerMatrix:
        kind = self.config.blocks
        block, size = BLOCK_SIZES[kind]
        share = share_of(part, in_features, split, source, columns=block)
        shape = (part.out_features, in_features // block * size)
        raw = source.take(f"{part.name}.weight_blocks", shape, split, torch.uint8)
        unpacked = UNPACK[kind](raw.view(share.out_features, -1, size))
        rows = share.out_features
        return IntegerMatrix(
            codes=unpacked.codes.reshape(rows, -1),
            bits=4 if kind.startswith("Q4") else 8,
            scale=unpacked.scale.reshape(rows, -1),
            offset=None if unpacked.offset is None else unpacked.offset.reshape(rows, -1),
        )


def _halves(raw: torch.Tensor, first: int, count: int = 1) -> torch.Tensor:
    """``count`` float16 numbers from byte ``first`` of each block on, as float32."""
    return raw[..., first : first + 2 * count].contiguous().view(torch.float16).float()


def _nibbles(raw: torch.Tensor) -> torch.Tensor:
    """(..., n) bytes -> (..., 2 n): all low halves, then all high ones."""
    return torch.cat((raw & 0xF, raw >> 4), dim=-1)


def _high_bits(raw: torch.Tensor) -> torch.Tensor:
    """(..., 4) bytes -> (..., 32): bit i of the little-endian word, as 16 or 0."""
    bits = raw.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=raw.device) & 1
    return bits.flatten(-2) << 4


def _q4_0(raw: torch.Tensor) -> Unpacked:
    return Unpacked(_nibbles(raw[..., 2:]), _halves(raw, 0))


def _q4_1(raw: torch.Tensor) -> Unpacked:
    return Unpacked(_nibbles(raw[..., 4:]), _halves(raw, 0), _halves(raw, 2))


def _q5_0(raw: torch.Tensor) -> Unpacked:
    codes = _nibbles(raw[..., 6:]) | _high_bits(raw[..., 2:6])
    return Unpacked(codes + (MIDDLE - 16), _halves(raw, 0))


def _q5_1(raw: torch.Tensor) -> Unpacked:
    codes = _nibbles(raw[..., 8:]) | _high_bits(raw[..., 4:8])
    return Unpacked(codes, _halves(raw, 0), _halves(raw, 2))


def _q8_0(raw: torch.Tensor) -> Unpacked:
    return Unpacked(raw[..., 2:] ^ MIDDLE, _halves(raw, 0))


def _six_bit_scales(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """12 bytes -> 8 scales and 8 minima of 6 bits: the first four of each stand in the low bits of bytes 0 to 7, the
    others in halves of bytes 8 to 11 with their top bits in the top bits of bytes 0 to 7."""
    low, high = raw[..., :4], raw[..., 4:8]
    rest = raw[..., 8:12]
    scales = torch.cat((low & 63, rest & 0xF | low >> 6 << 4), dim=-1)
    minima = torch.cat((high & 63, rest >> 4 | high >> 6 << 4), dim=-1)
    return scales.float(), minima.float()


def _k_quant(raw: torch.Tensor, codes: torch.Tensor) -> Unpacked:
    """(rows, blocks, 8, 32) codes with the scales that Q4_K and Q5_K begin with."""
    scales, minima = _six_bit_scales(raw[..., 4:16])
    return Unpacked(codes.flatten(-2), _halves(raw, 0) * scales, -(_halves(raw, 2) * minima))


def _eights(raw: torch.Tensor) -> torch.Tensor:
    """(rows, blocks, 128) bytes -> (rows, blocks, 8, 32): halves of 32 bytes each, the low ones first."""
    chunks = raw.reshape(*raw.shape[:2], 4, 1, 32)
    return torch.cat((chunks & 0xF, chunks >> 4), dim=3).flatten(2, 3)


def _q4_k(raw: torch.Tensor) -> Unpacked:
    return _k_quant(raw, _eights(raw[..., 16:]))


def _q5_k(raw: torch.Tensor) -> Unpacked:
    places = torch.arange(8, dtype=torch.uint8, device=raw.device).unsqueeze(-1)
    high = raw[..., 16:48].unsqueeze(-2) >> places & 1
    return _k_quant(raw, _eights(raw[..., 48:]) | high << 4)


def _q6_k(raw: torch.Tensor) -> Unpacked:
    # Two halves of 128 weights, each with 64 bytes of low and 32 of high bits.
    shape = raw.shape[:2]
    low = _nibbles(raw[..., :128].reshape(*shape, 2, 64)).view(*shape, 2, 4, 32)
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=raw.device).unsqueeze(-1)
    high = raw[..., 128:192].reshape(*shape, 2, 1, 32) >> places & 3
    codes = (low | high << 4) + (MIDDLE - 32)
    scales = raw[..., 192:208].contiguous().view(torch.int8).float()
    return Unpacked(codes.flatten(2), _halves(raw, 208) * scales)


UNPACK: dict[str, Callable[[torch.Tensor], Unpacked]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
