"""Weights as the compressed-tensors library stores them: ``weight_packed`` or ``weight``, and ``weight_scale``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engines.kernels import Float8Matrix, IntegerMatrix
from engines.protocol import EngineLoadError
from engines.quant.activation_order import in_group_order
from engines.quant.base import LinearPart, Split, WeightSource
from engines.quant.invented import INPUT_FLOAT8_SCALE, INPUT_INT8_SCALE, even_scale, float8_scale, repeated_code
from engines.quant.packing import codes_of_signed, packed_bytes, unpack_codes
from engines.quant.share import Share, cut_columns, require_groups, share_of
from engines.quantization import CompressedFloat8, CompressedIntegers

WORD_BITS, WORD_BYTES = 32, 4


@dataclass(frozen=True, slots=True)
class CompressedIntegersMethod:
    """The QuantMethod of integers."""

    config: CompressedIntegers

    def tensor_names(self, part: LinearPart) -> tuple[str, ...]:
        config = self.config
        optional = {
            "weight_shape": config.packed,
            "weight_zero_point": not config.symmetric,
            "weight_g_idx": config.ordered,
            "input_scale": config.static_input,
        }
        names = ["weight_packed" if config.packed else "weight", "weight_scale"]
        names += [name for name, stored in optional.items() if stored]
        return tuple(f"{part.name}.{name}" for name in names)

    def create_weights(self, part: LinearPart, in_features: int, split: Split, source: WeightSource) -> IntegerMatrix:
        config = self.config
        group = config.group_size if config.strategy == "group" else in_features
        groups = require_groups(part, in_features, group)
        share = self._share(part, in_features, group, split, source)
        codes = self._codes(part, in_features, share, source)
        scale = self._scale(part, groups, share, source)
        matrix = IntegerMatrix(
            codes=codes,
            bits=config.bits,
            scale=scale,
            offset=None if config.symmetric else -self._zeros(part, groups, share, source).float() * scale,
            activations=config.activations,
            input_scale=_input_scale(part, source, INPUT_INT8_SCALE) if config.static_input else None,
        )
        if not config.ordered:
            return matrix
        in_turn = torch.arange(in_features, dtype=torch.int32) // group
        group_of = source.take(f"{part.name}.weight_g_idx", (in_features,), "none", torch.int32, in_turn)
        return in_group_order(part, matrix, group_of)

    def _share(self, part: LinearPart, in_features: int, group: int, split: Split, source: WeightSource) -> Share:
        config = self.config
        if config.ordered and split == "in" and source.world > 1:
            raise EngineLoadError(f"layer {part.name}: weights in activation order cannot be shared by several devices")
        # A cut between two words is one between two codes only here.
        unit = WORD_BITS // math.gcd(WORD_BITS, config.bits) if config.packed else 1
        columns = cut_columns(unit, group, in_features // group)
        return share_of(part, in_features, split, source, rows=1 if config.symmetric else unit, columns=columns)

    def _codes(self, part: LinearPart, in_features: int, share: Share, source: WeightSource) -> torch.Tensor:
        bits = self.config.bits
        if not self.config.packed:
            signed = source.take(f"{part.name}.weight", (part.out_features, in_features), share.split, torch.int8)
            return codes_of_signed(signed, bits)
        require_shape(part, in_features, source)
        words = packed_bytes(in_features, bits, WORD_BYTES) // WORD_BYTES
        packed = source.take(f"{part.name}.weight_packed", (part.out_features, words), share.split, torch.int32)
        return unpack_codes(packed, bits, share.in_features)

    def _scale(self, part: LinearPart, groups: int, share: Share, source: WeightSource) -> torch.Tensor:
        """(out, groups) of this rank."""
        name, invented = f"{part.name}.weight_scale", even_scale(share.in_features, self.config.bits)
        if self.config.strategy == "tensor":
            scale = source.take(name, (1,), "none", torch.float32, invented)
            return scale.expand(share.out_features).unsqueeze(1).contiguous()
        return source.take(name, (part.out_features, groups), share.of_groups(groups), torch.float32, invented)

    def _zeros(self, part: LinearPart, groups: int, share: Share, source: WeightSource) -> torch.Tensor:
        """Codes of the zero points, (out, groups) of this rank, or (1, 1)."""
        name, bits = f"{part.name}.weight_zero_point", self.config.bits
        if self.config.packed and self.config.strategy != "tensor":
            words = packed_bytes(part.out_features, bits, WORD_BYTES) // WORD_BYTES
            middle = repeated_code(1 << bits - 1, bits, words).unsqueeze(1)
            packed = source.take(name, (words, groups), share.of_groups(groups), torch.int32, middle)
            return unpack_codes(packed.t(), bits, share.out_features).t()
        middle = torch.tensor(0, dtype=torch.int8)
        if self.config.strategy == "tensor":
            return codes_of_signed(source.take(name, (1,), "none", torch.int8, middle), bits).view(1, 1)
        signed = source.take(name, (part.out_features, groups), share.of_groups(groups), torch.int8, middle)
        return codes_of_signed(signed, bits)


@dataclass(frozen=True, slots=True)
class CompressedFloat8Method:
    """The QuantMethod of float8 e4m3."""

    config: CompressedFloat8

    def tensor_names(self, part: LinearPart) -> tuple[str, ...]:
        names = ("weight", "weight_scale", "input_scale")[: 3 if self.config.static_input else 2]
        return tuple(f"{part.name}.{name}" for name in names)

    def create_weights(self, part: LinearPart, in_features: int, split: Split, source: WeightSource) -> Float8Matrix:
        config = self.config
        rows, columns = config.block if config.strategy == "block" else (1, 1)
        share = share_of(part, in_features, split, source, rows, columns)
        codes = source.take(f"{part.name}.weight", (part.out_features, in_features), split, torch.float8_e4m3fn)
        name, invented = f"{part.name}.weight_scale", float8_scale(share.in_features)
        if config.strategy == "tensor":
            scale = source.take(name, (1,), "none", torch.float32, invented).view(1, 1)
            block = (share.out_features, share.in_features)
        elif config.strategy == "channel":
            scale = source.take(name, (part.out_features, 1), share.of_groups(1), torch.float32, invented)
            block = (1, share.in_features)
        else:
            shape = (-(-part.out_features // rows), -(-in_features // columns))
            scale = source.take(name, shape, split, torch.float32, invented)
            block = config.block
        return Float8Matrix(
            codes=codes,
            scale=scale,
            block=block,
            activations=config.activations,
            input_scale=_input_scale(part, source, INPUT_FLOAT8_SCALE) if config.static_input else None,
        )


def require_shape(part: LinearPart, in_features: int, source: WeightSource) -> None:
    """Raises EngineLoadError unless ``weight_shape`` is the layer's."""
    expected = torch.tensor([part.out_features, in_features])
    stored = source.take(f"{part.name}.weight_shape", (2,), "none", torch.int64, expected)
    if not stored.is_meta and stored.tolist() != expected.tolist():
        raise EngineLoadError(
            f"tensor {part.name}.weight_shape says {stored.tolist()} where the config asks for {expected.tolist()}"
        )


def _input_scale(part: LinearPart, source: WeightSource, invented: torch.Tensor) -> torch.Tensor:
    """() float32."""
    return source.take(f"{part.name}.input_scale", (1,), "none", torch.float32, invented).view(())
