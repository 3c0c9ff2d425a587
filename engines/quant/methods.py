"""Which QuantMethod reads a layer."""

from __future__ import annotations

from typing import Protocol

from engines.quant.base import QuantMethod
from engines.quant.dense import DenseMethod


class Methods(Protocol):
    """The formats of one model's layers."""

    def __call__(self, layer: str) -> QuantMethod:
        """Of the linear layer with this name in the checkpoint, without ``.weight``."""


def unquantized(layer: str) -> QuantMethod:
    """The Methods of a model without quantization."""
    return DenseMethod()
