"""Weights as AutoAWQ's GEMM layout stores them: input axis first, eight outputs in a word, in an order of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.kernels import IntegerMatrix
from engines.protocol import EngineLoadError
from engines.quant.base import LinearPart, Split, WeightSource
from engines.quant.invented import even_scale, repeated_code
from engines.quant.packing import unpack_codes
from engines.quant.share import cut_columns, require_groups, share_of, turned
from engines.quantization import Awq

BITS, PER_WORD = 4, 8
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of eight neighbouring outputs stands in a word, counted from the lowest bits."""


@dataclass(frozen=True, slots=True)
class AwqMethod:
    """The QuantMethod of AWQ files."""

    config: Awq

    def tensor_names(self, part: LinearPart) -> tuple[str, ...]:
        return tuple(f"{part.name}.{name}" for name in ("qweight", "qzeros", "scales"))

    def create_weights(self, part: LinearPart, in_features: int, split: Split, source: WeightSource) -> IntegerMatrix:
        group = self.config.group_size or in_features
        groups = require_groups(part, in_features, group)
        words, rest = divmod(part.out_features, PER_WORD)
        if rest:
            raise EngineLoadError(f"layer {part.name}: AWQ needs a multiple of 8 outputs, not {part.out_features}")
        share = share_of(part, in_features, split, source, rows=PER_WORD, columns=cut_columns(1, group, groups))
        of_groups = turned(share.of_groups(groups))
        packed = source.take(f"{part.name}.qweight", (in_features, words), turned(split), torch.int32)
        invented = even_scale(share.in_features, BITS)
        shape = (groups, part.out_features)
        scale = source.take(f"{part.name}.scales", shape, of_groups, torch.float32, invented).t().contiguous()
        middle = repeated_code(1 << BITS - 1, BITS, words)
        zeros = _outputs(source.take(f"{part.name}.qzeros", (groups, words), of_groups, torch.int32, middle))
        return IntegerMatrix(codes=_outputs(packed), bits=BITS, scale=scale, offset=-zeros.float() * scale)


def _outputs(packed: torch.Tensor) -> torch.Tensor:
    """(R, words) int32 -> (outputs, R) uint8 codes."""
    rows, words = packed.shape
    codes = unpack_codes(packed, BITS, words * PER_WORD).view(rows, words, PER_WORD)
    return codes[:, :, list(PLACES)].view(rows, words * PER_WORD).t().contiguous()
