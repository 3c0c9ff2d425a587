"""Weights as AutoGPTQ and GPTQModel store them: ``qweight``, ``qzeros``, ``scales`` and ``g_idx``, input axis first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engines.kernels import IntegerMatrix
from engines.protocol import EngineLoadError
from engines.quant.activation_order import in_group_order
from engines.quant.base import LinearPart, Split, WeightSource
from engines.quant.compressed import WORD_BITS, WORD_BYTES
from engines.quant.invented import even_scale, repeated_code
from engines.quant.packing import packed_bytes, unpack_codes
from engines.quant.share import cut_columns, require_groups, share_of, turned
from engines.quantization import Gptq


@dataclass(frozen=True, slots=True)
class GptqMethod:
    """The QuantMethod of GPTQ files; version 1 stores zero points less one."""

    config: Gptq

    def tensor_names(self, part: LinearPart) -> tuple[str, ...]:
        return tuple(f"{part.name}.{name}" for name in ("qweight", "qzeros", "scales", "g_idx"))

    def create_weights(self, part: LinearPart, in_features: int, split: Split, source: WeightSource) -> IntegerMatrix:
        bits, group = self.config.bits, self.config.group_size or in_features
        groups, cut = require_groups(part, in_features, group), turned(split)
        unit = WORD_BITS // math.gcd(WORD_BITS, bits)
        share = share_of(part, in_features, split, source, rows=unit, columns=cut_columns(unit, group, groups))
        # Both axes are packed into words, the input's in the weight and the output's in the zero points.
        _require_words(part, in_features, bits)
        _require_words(part, part.out_features, bits)
        rows = packed_bytes(in_features, bits, WORD_BYTES) // WORD_BYTES
        packed = source.take(f"{part.name}.qweight", (rows, part.out_features), cut, torch.int32)
        codes = unpack_codes(packed.t(), bits, share.in_features)
        of_groups = turned(share.of_groups(groups))
        invented = even_scale(share.in_features, bits)
        shape = (groups, part.out_features)
        scale = source.take(f"{part.name}.scales", shape, of_groups, torch.float32, invented).t().contiguous()
        zeros = self._zeros(part, (groups, part.out_features), of_groups, source)
        in_turn = torch.arange(in_features, dtype=torch.int32) // group
        group_of = source.take(f"{part.name}.g_idx", (in_features,), "none", torch.int32, in_turn)
        matrix = IntegerMatrix(codes=codes, bits=bits, scale=scale, offset=-zeros.float() * scale)
        if share.in_features == in_features:
            return in_group_order(part, matrix, group_of)
        if not torch.equal(group_of.cpu(), in_turn):
            raise EngineLoadError(f"layer {part.name}: weights in activation order cannot be shared by several devices")
        return matrix

    def _zeros(self, part: LinearPart, shape: tuple[int, int], split: Split, source: WeightSource) -> torch.Tensor:
        """Codes of the zero points, (out, groups) of this rank; ``shape`` is (groups, out) of all."""
        bits, less = self.config.bits, int(self.config.zero_less_one)
        words = packed_bytes(shape[1], bits, WORD_BYTES) // WORD_BYTES
        middle = repeated_code((1 << bits - 1) - less, bits, words)
        stored = source.take(f"{part.name}.qzeros", (shape[0], words), split, torch.int32, middle)
        if less and WORD_BITS % bits == 0:
            # Added to the whole word: a zero point of 0 was stored as -1, which borrowed from its neighbour.
            stored, less = stored + repeated_code(1, bits, stored.shape[1]).to(stored.device), 0
        codes = unpack_codes(stored, bits, stored.shape[1] * WORD_BITS // bits)
        return (codes + less & (1 << bits) - 1).t()


def _require_words(part: LinearPart, size: int, bits: int) -> None:
    if size * bits % WORD_BITS:
        raise EngineLoadError(f"layer {part.name}: {size} codes of {bits} bits do not fill whole words of 32 bits")
