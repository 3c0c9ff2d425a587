"""The skinny linear kernel against its definition, through Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.triton_interpreter import DEVICE

pytest.importorskip("triton")

from engines.kernels import Fusion, PackedLinear, RmsNorm, Stream, add_linear, backends, linear
from engines.kernels.cuda import TritonKernels, skinny
from engines.kernels.cuda.tuning import MOST_SQUARES, SkinnyConfig
from engines.kernels.linear import NORM_APART_ROWS
from tests.linear_cases import EPS, LinearCase

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


@pytest.mark.parametrize("config", [NARROW, SPLIT, WIDE, WIDE_SPLIT])
@pytest.mark.parametrize(("rows", "parts"), [(3, 1), (9, 12), (20, 33)])
def test_a_norm_that_was_handed_over(config: SkinnyConfig, rows: int, parts: int) -> None:
    case = LinearCase.draw(rows, 72, 400, torch.bfloat16, DEVICE, norm=True, bias=True, gated=True)
    assert case.distance(case.run(config, parts=parts)) < TOLERANCE


@pytest.mark.parametrize("config", [NARROW, SPLIT, WIDE, WIDE_SPLIT])
@pytest.mark.parametrize("rows", [2, 17])
def test_a_norm_is_handed_over(config: SkinnyConfig, rows: int) -> None:
    """The last tile is not full, which no sum may show."""
    case = LinearCase.draw(rows, 104, 272, torch.bfloat16, DEVICE, residual=True)
    handover = case.empty_handover(config)
    hidden = case.run(config, handover=handover)
    assert torch.equal(hidden, case.run(config))
    case.check_handover(hidden, handover)


@pytest.mark.parametrize("rows", [3, NORM_APART_ROWS])
@pytest.mark.parametrize("depth", [64, 4096])
def test_a_layer_uses_what_the_one_before_handed_over(rows: int, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else, where there would be too many sums, the stream."""
    kernels = TritonKernels()
    norms: list[bool] = []

    def config_for_all(
        rows: int, lines: int, depth: int, gated: bool, norm: bool, device: torch.device
    ) -> SkinnyConfig:
        norms.append(norm)
        return NARROW

    monkeypatch.setattr(kernels, "skinny_config", config_for_all)
    monkeypatch.setattr(backends, "triton_for", lambda *tensors: kernels)
    producer = LinearCase.draw(rows, depth, 32, torch.bfloat16, DEVICE)
    consumer = LinearCase.draw(rows, 48, depth, torch.bfloat16, DEVICE, norm=True, gated=True)
    assert consumer.gain is not None
    norm = RmsNorm(consumer.gain, EPS)
    before = Stream(torch.randn(rows, depth).to(DEVICE, torch.bfloat16))
    stream = add_linear(producer.x, turned(producer.weight), None, before, norm)
    assert torch.equal(stream.hidden, add_linear(producer.x, turned(producer.weight), None, before).hidden)
    fits = max(rows, 8) * depth // NARROW.block_n <= MOST_SQUARES
    assert (stream.handover is not None) is fits
    fusion = Fusion(norm=norm, gated=True)
    norms.clear()
    result = linear(stream, turned(consumer.weight), None, fusion)
    assert norms == [not fits and rows < NORM_APART_ROWS], "where the norm is computed"
    consumer.x.copy_(stream.hidden)
    assert consumer.distance(result) < TOLERANCE
    # A stream handed over for another norm is normed as a plain one.
    torch.testing.assert_close(
        linear(stream, turned(consumer.weight), None, replace(fusion, norm=replace(norm, eps=0.5))),
        linear(stream.hidden, turned(consumer.weight), None, replace(fusion, norm=replace(norm, eps=0.5))),
        rtol=0.0,
        atol=0.0,
    )


def turned(weight: torch.Tensor) -> PackedLinear:
    """As ``pack_linear`` has it on a GPU."""
    return PackedLinear(weight.t(), "turned", *weight.shape)


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
