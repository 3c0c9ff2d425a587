"""Our codebooks: ``weight_codes``, packed with each row padded to whole bytes, and ``weight_codebook``; where the layer
shares one set of levels, ``weight_scale`` of each group."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engines.kernels import CodebookMatrix
from engines.quant.base import LinearPart, Split, WeightSource
from engines.quant.compressed import require_shape
from engines.quant.invented import normal_levels
from engines.quant.packing import packed_bytes, unpack_codes
from engines.quant.share import Share, cut_columns, require_groups, share_of
from engines.quantization import Codebook


@dataclass(frozen=True, slots=True)
class CodebookMethod:
    """The QuantMethod of k-means codebooks."""

    config: Codebook

    def tensor_names(self, part: LinearPart) -> tuple[str, ...]:
        names = ("weight_codes", "weight_codebook", "weight_shape", "weight_scale")[: 4 if self.config.shared else 3]
        return tuple(f"{part.name}.{name}" for name in names)

    def create_weights(self, part: LinearPart, in_features: int, split: Split, source: WeightSource) -> CodebookMatrix:
        bits, group = self.config.bits, self.config.group_size or in_features
        groups = require_groups(part, in_features, group)
        unit = 8 // math.gcd(8, bits)
        share = share_of(part, in_features, split, source, columns=cut_columns(unit, group, groups))
        require_shape(part, in_features, source)
        packed = source.take(
            f"{part.name}.weight_codes", (part.out_features, packed_bytes(in_features, bits)), split, torch.uint8
        )
        codes, scale = unpack_codes(packed, bits, share.in_features), None
        if self.config.shared:
            codebook = self._shared_levels(part, share.out_features, source)
            name, size = f"{part.name}.weight_scale", torch.tensor(share.in_features**-0.5)
            scale = source.take(name, (part.out_features, groups), share.of_groups(groups), torch.float32, size)
        else:
            codebook = self._own_levels(part, groups, share, source)
        return CodebookMatrix(codes, bits, codebook, scale=scale)

    def _shared_levels(self, part: LinearPart, rows: int, source: WeightSource) -> torch.Tensor:
        """(rows, 1, levels)."""
        bits = self.config.bits
        levels = source.take(
            f"{part.name}.weight_codebook", (1, 1, 1 << bits), "none", torch.float32, normal_levels(1, bits)
        )
        return levels.expand(rows, 1, -1).contiguous()

    def _own_levels(self, part: LinearPart, groups: int, share: Share, source: WeightSource) -> torch.Tensor:
        """(out, groups, levels) of this rank."""
        bits = self.config.bits
        name, levels = f"{part.name}.weight_codebook", normal_levels(share.in_features, bits)
        shape = (part.out_features, groups, 1 << bits)
        if share.of_groups(groups) != "in":
            return source.take(name, shape, share.of_groups(groups), torch.float32, levels)
        # The axis that is cut stands in the middle.
        whole = source.take(name, shape, "none", torch.float32, levels)
        local = groups // source.world
        return whole[:, source.rank * local : (source.rank + 1) * local].contiguous()
