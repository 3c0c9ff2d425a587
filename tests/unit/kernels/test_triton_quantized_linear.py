"""Quantized layers as ``linear`` runs them on a GPU, through Triton's interpreter where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.triton_interpreter import DEVICE

pytest.importorskip("triton")

from engines.kernels import Fusion, QuantizedMatrix, RmsNorm, backends, linear
from engines.kernels.cuda import TritonKernels
from engines.kernels.cuda.quantized_tuning import QuantizedConfig
from engines.kernels.linear import Stream, add_linear
from engines.kernels.quantized_gpu import FEWEST_CODED, GpuQuantized, pack_gpu
from tests.quantized_cases import CASES, distance, exact_product, float8, integers, layers_of_files, levels

FEW = QuantizedConfig(block_n=16, parts=4, splits=2, warps=4, stages=2, prefetch=0, early=False)
WIDTH = 160


@pytest.fixture(params=["one kernel", "many rows"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernels for tensors of any device, in the form for few rows or that for many."""
    kernels = TritonKernels()
    config = FEW if request.param == "one kernel" else None
    monkeypatch.setattr(kernels, "quantized_config", lambda *arguments: config)
    monkeypatch.setattr(backends, "shared_triton", lambda: kernels)
    monkeypatch.setattr(backends, "triton_for", lambda *tensors: kernels)
    return str(request.param)


def matrices() -> dict[str, QuantizedMatrix]:
    eight = integers(48, WIDTH, 8, activations="int8", device=DEVICE)
    order = torch.randperm(WIDTH, device=DEVICE)
    return {
        "int4": integers(40, WIDTH, 4, 32, "zeros", device=DEVICE),
        "ordered": replace(integers(40, WIDTH, 4, 32, device=DEVICE), order=order),
        "w8a8": eight,
        "w8a8 static": replace(eight, input_scale=torch.tensor(0.03, device=DEVICE)),
        "w8a8 groups": integers(40, WIDTH, 8, 32, "zeros", "int8", device=DEVICE),
        "fp8": float8(48, WIDTH, (48, WIDTH), device=DEVICE),
        "codebook": levels(40, WIDTH, 4, device=DEVICE),
    }


def packed_of(matrix: QuantizedMatrix) -> GpuQuantized:
    packed = pack_gpu(matrix)
    assert packed is not None
    return packed


@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize(
    ("rows", "dtype", "least"),
    [
        (3, torch.bfloat16, 1.6e-2),
        (5, torch.float16, 1e-2),
        (2, torch.float32, 1e-5),
        (FEWEST_CODED, torch.bfloat16, 1.6e-2),
    ],
)
def test_layers(name: str, rows: int, dtype: torch.dtype, least: float) -> None:
    matrix = matrices()[name]
    packed = packed_of(matrix)
    assert (packed.in_features, packed.out_features) == (WIDTH, matrix.shape[0])
    x = torch.randn(rows, WIDTH, device=DEVICE).to(dtype)
    bias = torch.randn(matrix.shape[0], device=DEVICE).to(dtype)
    gate, up = (exact_product(x, matrix) + bias.double()).chunk(2, dim=1)
    residual = torch.randn(rows, matrix.shape[0] // 2, device=DEVICE).to(dtype)
    expected = torch.nn.functional.silu(gate) * up + residual.double()
    result = linear(x, packed, bias, Fusion(gated=True, residual=residual))
    assert result.dtype is dtype
    assert distance(result, expected) < least


@pytest.mark.parametrize("name", ["int4", "ordered", "w8a8"])
def test_after_a_norm(name: str) -> None:
    matrix = matrices()[name]
    x, gain = torch.randn(4, WIDTH, device=DEVICE).bfloat16(), (torch.rand(WIDTH, device=DEVICE) + 0.5).bfloat16()
    norm = RmsNorm(gain, 1e-6)
    normed = torch.nn.functional.rms_norm(x.float(), (WIDTH,), gain.float(), 1e-6).bfloat16()
    result = linear(x, packed_of(matrix), None, Fusion(norm=norm, dtype=torch.float32))
    assert distance(result, exact_product(normed, matrix)) < 2e-2


@pytest.mark.parametrize("name", ["int4", "w8a8"])
def test_norms_are_handed_over(way: str, name: str) -> None:
    """From a layer that writes the stream to one that reads it; one that rounds its input takes the norm itself."""
    writes, reads = integers(WIDTH, 96, 4, 32, device=DEVICE), matrices()[name]
    hidden, x = (torch.randn(4, width, device=DEVICE).bfloat16() for width in (WIDTH, 96))
    norm = RmsNorm((torch.rand(WIDTH, device=DEVICE) + 0.5).bfloat16(), 1e-6)
    stream = add_linear(x, packed_of(writes), None, Stream(hidden.clone()), norm)
    expected = (hidden.double() + exact_product(x, writes)).bfloat16()
    assert distance(stream.hidden, expected.double()) < 8e-3
    assert (stream.handover is not None) == (way == "one kernel")
    result = linear(stream, packed_of(reads), None, Fusion(norm=norm, dtype=torch.float32))
    normed = torch.nn.functional.rms_norm(stream.hidden.float(), (WIDTH,), norm.weight.float(), 1e-6)
    assert distance(result, exact_product(normed, reads)) < 2e-2


@pytest.mark.parametrize("case", CASES)
def test_layers_of_files(case: str) -> None:
    """Of every format that other tools wrote."""
    for name, matrix in layers_of_files(case, DEVICE):
        x = torch.randn(3, 64, device=DEVICE).bfloat16()
        assert distance(linear(x, packed_of(matrix)), exact_product(x, matrix)) < 1.6e-2, name
