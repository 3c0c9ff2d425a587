"""Quantized experts against their definition, through Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.triton_interpreter import DEVICE

pytest.importorskip("triton")

from engines.kernels import Matrix, backends
from engines.kernels.cuda import TritonKernels
from engines.kernels.cuda.quantized_experts import quantized_mixture, routed
from engines.kernels.cuda.quantized_layout import DENSE
from engines.kernels.quantized import round_activations
from engines.kernels.quantized_experts import pack_stacks
from tests.quantized_cases import distance, float8, integers, levels

WIDTH, INNER, EXPERTS = 160, 96, 20
TOLERANCE = {"fp8": 4e-2}
"""A last bit of what lies between both products can be a step of float8 further on."""


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "shared_triton", TritonKernels)


def product(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    if isinstance(matrix, torch.Tensor):
        return x @ matrix.float().t()
    return round_activations(x, matrix) @ matrix.dequantize().t()


def expected(
    stream: torch.Tensor,
    normed: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    gate_up: list[list[Matrix]],
    down: list[Matrix],
) -> torch.Tensor:
    total = stream.float()
    for number in range(len(down)):
        token, column = (experts == number).nonzero(as_tuple=True)
        if token.numel():
            gate, up = (product(normed[token].float(), part) for part in gate_up[number])
            gated = (torch.nn.functional.silu(gate) * up).to(stream.dtype).float()
            total = total.index_add(0, token, product(gated, down[number]) * weights[token, column].unsqueeze(1))
    return total


def mixed(number: int, lines: int, depth: int) -> Matrix:
    """Busy experts of 8 bits, idle ones of 4, one left as it is, one with a format that has no kernel."""
    if number == 3:
        plain: torch.Tensor = torch.randn(lines, depth, device=DEVICE) / depth**0.5
        return plain.bfloat16()
    if number == 4:
        return integers(lines, depth, 4, 8, device=DEVICE)
    return integers(lines, depth, 8 if number % 4 == 0 else 4, 32, device=DEVICE)


def ordered_parts(lines: int, depth: int) -> list[Matrix]:
    """Gate and up, whose columns have one order."""
    gate = integers(lines, depth, 4, 32, device=DEVICE)
    order = torch.randperm(depth, device=DEVICE)
    return [replace(gate, order=order), replace(integers(lines, depth, 4, 32, device=DEVICE), order=order)]


FORMATS: dict[str, Callable[[int, int, int], Matrix]] = {
    "int4": lambda number, lines, depth: integers(lines, depth, 4, 32, "zeros", device=DEVICE),
    "w8a8": lambda number, lines, depth: integers(lines, depth, 8, activations="int8", device=DEVICE),
    "fp8": lambda number, lines, depth: float8(lines, depth, (1, depth), "float8", device=DEVICE),
    "codebook": lambda number, lines, depth: levels(lines, depth, 4, device=DEVICE),
    "ordered": lambda number, lines, depth: ordered_parts(lines, depth)[0],
    "mixed": mixed,
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("tokens", "chosen"), [(1, 3), (9, 4), (260, 3)])
def test_products(name: str, tokens: int, chosen: int) -> None:
    if tokens > 100 and name not in ("int4", "mixed"):
        pytest.skip("larger tiles differ in nothing else")
    make = FORMATS[name]
    gate_up = [[make(number, INNER, WIDTH), make(number, INNER, WIDTH)] for number in range(EXPERTS)]
    if name == "ordered":
        gate_up = [ordered_parts(INNER, WIDTH) for _ in range(EXPERTS)]
    down = [make(number, WIDTH, INNER) for number in range(EXPERTS)]
    stacks = pack_stacks(gate_up, down, chosen)
    assert stacks is not None
    stream = torch.randn(tokens, WIDTH, device=DEVICE).bfloat16()
    normed = torch.randn(tokens, WIDTH, device=DEVICE).bfloat16()
    weights, experts = torch.rand(tokens, EXPERTS, device=DEVICE).topk(chosen, dim=1)
    slots = torch.arange(tokens, device=DEVICE)
    slots[tokens // 2 : tokens // 2 + tokens // 8] = -1
    real = slots >= 0
    result = quantized_mixture(stream, routed(normed, weights, experts, slots), stacks)
    wanted = expected(stream, normed, weights, experts, gate_up, down)[real]
    assert distance(result[real] - stream[real], (wanted - stream[real]).double()) < TOLERANCE.get(name, 2e-2)
    assert torch.equal(result[~real], stream[~real])


def test_experts_of_one_format_share_a_stack() -> None:
    down = [mixed(number, 32, 64) for number in range(8)]
    gate_up = [[mixed(number, 32, 64), mixed(number, 32, 64)] for number in range(8)]
    stacks = pack_stacks(gate_up, down, 2)
    assert stacks is not None
    places = sorted(stack.places.tolist() for stack in stacks.down)
    assert [-1, -1, -1, 0, -1, -1, -1, -1] in places, "the plain expert"
    assert [0, -1, -1, -1, -1, -1, -1, -1] in places, "the 8-bit expert; number 4 has a format of its own"
    assert [-1, 0, 1, -1, -1, 2, 3, 4] in places
    assert sum(stack.codes.format == DENSE for stack in stacks.down) == 2
