"""Quantizers by the names that recipes use."""

from __future__ import annotations

from compression.quantize.base import Quantizer
from compression.quantize.gptq import Gptq
from compression.quantize.rounding import RoundToNearest
from compression.recipe import Method


def make_quantizer(method: Method) -> Quantizer:
    """The Quantizer that a recipe's ``method`` names."""
    if method == "gptq":
        return Gptq()
    if method == "kmeans":
        from compression.quantize.codebook import KMeans

        return KMeans()
    return RoundToNearest()
