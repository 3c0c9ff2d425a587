"""The unquantized method against plain matrix products."""

from __future__ import annotations

import torch

from engines.kernels import PLAIN
from engines.models.weights import Placement, RandomSource
from engines.quant.base import LinearLayout, LinearPart
from engines.quant.dense import DenseMethod

ROWS, WIDTH = 11, 24
SOURCE = RandomSource(Placement(device=torch.device("cpu"), dtype=torch.float32), seed=1)
METHOD = DenseMethod()


def x() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def test_stacked_parts_come_out_side_by_side() -> None:
    parts = (LinearPart("q", 16), LinearPart("k", 8), LinearPart("v", 5))
    layout = LinearLayout(parts, WIDTH, "out", bias=True)
    result = METHOD.apply(METHOD.finish(METHOD.create_weights(layout, SOURCE)), x(), PLAIN)
    expected = [
        x() @ SOURCE.take(f"{part.name}.weight", (part.out_features, WIDTH), "none").T
        + SOURCE.take(f"{part.name}.bias", (part.out_features,), "none")
        for part in parts
    ]
    torch.testing.assert_close(result, torch.cat(expected, dim=1))
