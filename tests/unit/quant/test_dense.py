"""Layers of unquantized weights against plain matrix products."""

from __future__ import annotations

import torch

from engines.models.layers import ModelBuilder
from engines.models.weights import Placement, RandomSource
from engines.quant.methods import unquantized

ROWS, WIDTH = 11, 24
SOURCE = RandomSource(Placement(device=torch.device("cpu"), dtype=torch.float32), seed=1)


def test_stacked_parts_come_out_side_by_side() -> None:
    x = torch.randn(ROWS, WIDTH)
    parts = {"q": 16, "k": 8, "v": 5}
    result = ModelBuilder(SOURCE, unquantized).linear(parts, WIDTH, "out", bias=True)(x)
    expected = [
        x @ SOURCE.take(f"{name}.weight", (size, WIDTH), "none").T + SOURCE.take(f"{name}.bias", (size,), "none")
        for name, size in parts.items()
    ]
    torch.testing.assert_close(result, torch.cat(expected, dim=1))
