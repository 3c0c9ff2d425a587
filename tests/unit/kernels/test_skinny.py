"""The skinny linear kernel against its definition, through Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from tests.triton_interpreter import DEVICE

pytest.importorskip("triton")

from engines.kernels.cuda import skinny
from engines.kernels.cuda.tuning import SkinnyConfig
from tests.linear_cases import LinearCase

NARROW = SkinnyConfig(block_n=16, block_k=128, parts=4, splits=1, warps=4, stages=3, prefetch=0, early=False)
SPLIT = SkinnyConfig(block_n=32, block_k=128, parts=4, splits=3, warps=4, stages=3, prefetch=0, early=False)
WIDE = SkinnyConfig(block_n=64, block_k=64, parts=0, splits=1, warps=4, stages=3, prefetch=0, early=False)
WIDE_SPLIT = SkinnyConfig(block_n=64, block_k=64, parts=0, splits=2, warps=4, stages=3, prefetch=0, early=False)
TOLERANCE = 1.5e-2
"""Of bfloat16; the interpreter cuts where the GPU rounds."""


@pytest.mark.parametrize("config", [NARROW, SPLIT, WIDE, WIDE_SPLIT])
@pytest.mark.parametrize(
    ("rows", "lines", "depth", "fused"),
    [
        (1, 40, 272, {"norm": True, "bias": True}),
        (5, 72, 512, {"norm": True, "gated": True}),
        (17, 66, 400, {"residual": True}),
        (33, 128, 384, {"norm": True, "bias": True, "gated": True, "residual": True}),
    ],
)
def test_layers(config: SkinnyConfig, rows: int, lines: int, depth: int, fused: dict[str, bool]) -> None:
    case = LinearCase.draw(rows, lines, depth, torch.bfloat16, DEVICE, **fused)
    first = case.run(config)
    assert case.distance(first) < TOLERANCE
    # The programs that share a tile leave their counters as they found them.
    assert torch.equal(case.run(config), first)


def test_the_result_can_be_wider_than_the_input() -> None:
    case = LinearCase.draw(3, 48, 256, torch.bfloat16, DEVICE)
    result = case.run(NARROW, torch.float32)
    assert result.dtype is torch.float32
    assert case.distance(result) < 1e-6


def test_a_split_without_a_whole_block_of_its_own() -> None:
    case = LinearCase.draw(2, 32, 336, torch.bfloat16, DEVICE, norm=True)
    assert case.distance(case.run(SPLIT)) < TOLERANCE


def test_float16() -> None:
    case = LinearCase.draw(4, 40, 256, torch.float16, DEVICE, bias=True, residual=True)
    assert case.distance(case.run(NARROW)) < 2e-3


def test_activations_of_any_size_give_numbers() -> None:
    case = LinearCase.draw(2, 32, 256, torch.bfloat16, DEVICE, norm=True, gated=True)
    for size in (0.0, 1e-30, 1e15):
        case.x.copy_(torch.randn(2, 256) * size)
        assert case.run(NARROW).isfinite().all()


def test_a_depth_that_the_kernel_cannot_take_is_left_to_others() -> None:
    assert skinny.skinny_config(1, 64, 100, False, False, torch.device("cuda", 0)) is None
