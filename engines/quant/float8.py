"""float8 e4m3 weights of ``quant_method`` fp8: DeepSeek's blocks with ``weight_scale_inv``, or one ``weight_scale``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.kernels import Float8Matrix
from engines.quant.base import LinearPart, Split, WeightSource
from engines.quant.invented import INPUT_FLOAT8_SCALE, float8_scale
from engines.quant.share import share_of
from engines.quantization import Float8


@dataclass(frozen=True, slots=True)
class Float8Method:
    """The QuantMethod of fp8 files. ``weight_scale_inv`` is what codes are multiplied by, its name notwithstanding."""

    config: Float8

    def tensor_names(self, part: LinearPart) -> tuple[str, ...]:
        names = ["weight", "weight_scale" if self.config.block is None else "weight_scale_inv"]
        if self.config.static_input:
            names.append("input_scale")
        return tuple(f"{part.name}.{name}" for name in names)

    def create_weights(self, part: LinearPart, in_features: int, split: Split, source: WeightSource) -> Float8Matrix:
        rows, columns = self.config.block or (1, 1)
        share = share_of(part, in_features, split, source, rows, columns)
        codes = source.take(f"{part.name}.weight", (part.out_features, in_features), split, torch.float8_e4m3fn)
        invented = float8_scale(share.in_features)
        if self.config.block is None:
            scale = source.take(f"{part.name}.weight_scale", (1,), "none", torch.float32, invented).view(1, 1)
            block = (share.out_features, share.in_features)
        else:
            shape = (-(-part.out_features // rows), -(-in_features // columns))
            scale = source.take(f"{part.name}.weight_scale_inv", shape, split, torch.float32, invented)
            block = self.config.block
        fixed = None
        if self.config.static_input:
            name = f"{part.name}.input_scale"
            fixed = source.take(name, (1,), "none", torch.float32, INPUT_FLOAT8_SCALE).view(())
        return Float8Matrix(codes, scale, block, activations="float8", input_scale=fixed)
