"""Scales and zero points for random codes, such that the weights come out as large as those of a random plain layer.

A layer of them keeps the size of what goes through it: a weight's standard deviation is ``in_features ** -0.5``.
"""

from __future__ import annotations

import math

import torch

from engines.quant.packing import pack_codes

FLOAT8_STD = 64.0
"""Of random float8 codes: most of the type's range is used."""
LARGEST_INPUT = 8.0
INPUT_INT8_SCALE, INPUT_FLOAT8_SCALE = torch.tensor(LARGEST_INPUT / 127), torch.tensor(LARGEST_INPUT / 448)
"""Of inputs with a standard deviation of 1, as norms give them."""


def even_scale(in_features: int, bits: int) -> torch.Tensor:
    """() float32, of 16 bits as files have it: for codes that are uniformly distributed over ``bits`` bits."""
    return torch.tensor(in_features**-0.5 * math.sqrt(12) / (1 << bits)).bfloat16().float()


def float8_scale(in_features: int) -> torch.Tensor:
    """() float32: for normally distributed codes of ``FLOAT8_STD``."""
    return torch.tensor(in_features**-0.5 / FLOAT8_STD)


def repeated_code(code: int, bits: int, words: int) -> torch.Tensor:
    """(words,) int32: packed codes that are all the same."""
    codes = torch.full((1, -(-words * 32 // bits)), code, dtype=torch.uint8)
    return pack_codes(codes, bits, align=4).view(torch.int32)[0, :words]


def normal_levels(in_features: int, bits: int) -> torch.Tensor:
    """(2 ** bits,) float32: of a codebook; equally likely levels of a normal distribution."""
    shares = (torch.arange(1 << bits) + 0.5) / (1 << bits)
    levels: torch.Tensor = torch.special.ndtri(shares) * in_features**-0.5
    return levels
