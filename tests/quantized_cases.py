"""Random quantized weights of every format, and the distance of a product from its definition."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from engines.kernels import CodebookMatrix, Float8Matrix, IntegerMatrix, QuantizedMatrix
from engines.kernels.matrices import Activations
from engines.kernels.quantized import round_activations
from engines.manifest import read_manifest
from engines.models.loader import open_weights
from engines.models.weights import FileSource, Placement
from engines.quant.base import LinearPart

FILES = Path(__file__).parent / "data" / "quantized"
"""Folders of layers that other tools quantized."""
CASES = sorted(path.name for path in FILES.iterdir() if path.is_dir())


def integers(
    lines: int,
    depth: int,
    bits: int,
    group: int = 0,
    offsets: str = "",
    activations: Activations = "float",
    exact: bool = True,
    device: torch.device | None = None,
) -> IntegerMatrix:
    """``group`` 0: a scale for each line. ``offsets``: "" (symmetric), "zeros" (integer zero points) or "any".
    ``exact``: scales fit into half precision."""
    groups = depth // group if group else 1
    scale = (torch.rand(lines, groups) + 0.5) * 4 / 2**bits / depth**0.5
    scale = scale.half().float() if exact else scale
    offset = None
    if offsets == "zeros":
        offset = -torch.randint(0, 2**bits, scale.shape).float() * scale
    elif offsets:
        offset = -(2**bits) * torch.rand(scale.shape) * scale
    codes = torch.randint(0, 2**bits, (lines, depth), dtype=torch.uint8)
    offset = None if offset is None else offset.to(device)
    return IntegerMatrix(codes.to(device), bits, scale.to(device), offset, activations=activations)


def float8(
    lines: int,
    depth: int,
    block: tuple[int, int],
    activations: Activations = "float",
    device: torch.device | None = None,
) -> Float8Matrix:
    """All codes that are numbers, subnormal ones among them."""
    raw = torch.randint(0, 256, (lines, depth), dtype=torch.uint8)
    codes = torch.where(raw & 0x7F == 0x7F, 0, raw).view(torch.float8_e4m3fn)
    scale = (torch.rand(-(-lines // block[0]), -(-depth // block[1])) + 0.5) / 64 / depth**0.5
    return Float8Matrix(codes.to(device), scale.to(device), block, activations)


def levels(
    lines: int, depth: int, bits: int, books: int = 1, groups: int = 0, device: torch.device | None = None
) -> CodebookMatrix:
    """``groups`` 0: without scales."""
    codebook = torch.randn(lines, books, 2**bits) / depth**0.5
    scale = (torch.randn(lines, groups)).half().float().to(device) if groups else None
    codes = torch.randint(0, 2**bits, (lines, depth), dtype=torch.uint8)
    return CodebookMatrix(codes.to(device), bits, codebook.to(device), scale=scale)


def layers_of_files(case: str, device: torch.device) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Each layer's name and its weight, 64 values deep."""
    reader, methods = open_weights(read_manifest(FILES / case))
    source = FileSource(Placement(device=device, dtype=torch.bfloat16), reader, lambda progress: None, total=1)
    for name in json.loads((FILES / case / "expected.json").read_text()):
        outputs = 32 if name.endswith(("k_proj", "v_proj")) else 64
        matrix = methods(name).create_weights(LinearPart(name, outputs), 64, "none", source)
        assert not isinstance(matrix, torch.Tensor)
        yield name, matrix


def exact_product(x: torch.Tensor, matrix: QuantizedMatrix) -> torch.Tensor:
    """(T, in) -> (T, out) float64, by definition."""
    return round_activations(x.float(), matrix).double() @ matrix.dequantize().double().t()


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative; NaN where an element was not written."""
    assert result.shape == expected.shape
    return float((result.double() - expected).norm() / expected.norm())
