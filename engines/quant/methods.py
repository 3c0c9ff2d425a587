"""Which QuantMethod reads a layer."""

from __future__ import annotations

from typing import Protocol

from engines.quant.awq import AwqMethod
from engines.quant.base import QuantMethod
from engines.quant.codebook import CodebookMethod
from engines.quant.compressed import CompressedFloat8Method, CompressedIntegersMethod
from engines.quant.dense import DenseMethod
from engines.quant.float8 import Float8Method
from engines.quant.gguf_blocks import GgufMethod
from engines.quant.gptq import GptqMethod
from engines.quantization import (
    Awq,
    Codebook,
    CompressedFloat8,
    CompressedIntegers,
    Float8,
    GgufBlocks,
    Gptq,
    LayerFormat,
    LayerFormats,
    Quantization,
)


class Methods(Protocol):
    """The formats of one model's layers."""

    def __call__(self, layer: str) -> QuantMethod:
        """Of the linear layer or embedding with this name in the checkpoint, without ``.weight``."""


def unquantized(layer: str) -> QuantMethod:
    """The Methods of a model without quantization."""
    return DenseMethod()


def methods_of(quantization: Quantization | None) -> Methods:
    """As the manifest says. Raises EngineLoadError for patterns that are no regular expressions."""
    if quantization is None:
        return unquantized
    formats = LayerFormats(quantization)
    return lambda layer: method_of(formats(layer))


def method_of(config: LayerFormat | None) -> QuantMethod:
    """Of one format; None stands for weights as they are."""
    match config:
        case None:
            return DenseMethod()
        case CompressedIntegers():
            return CompressedIntegersMethod(config)
        case CompressedFloat8():
            return CompressedFloat8Method(config)
        case Codebook():
            return CodebookMethod(config)
        case Gptq():
            return GptqMethod(config)
        case Awq():
            return AwqMethod(config)
        case Float8():
            return Float8Method(config)
        case GgufBlocks():
            return GgufMethod(config)
