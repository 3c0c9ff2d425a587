"""The logic of the grouped products for Hopper, run with NumPy; on the GPU see tests/gpu/test_experts_gpu.py."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from tests import gluon_emulator
from tests.expert_cases import EPS, ExpertCase, Shape

pytest.importorskip("tests.triton_interpreter", reason="needs Triton")
pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from engines.kernels.cuda import device, grouped, hopper_gated, hopper_grouped, hopper_slots, mixture
from engines.kernels.cuda.grouping import place_pairs
from engines.kernels.cuda.hopper_grouped import GroupedTile, Rows
from engines.kernels.cuda.launch import Tiled
from tests.triton_interpreter import DEVICE

if DEVICE.type == "cuda":
    pytest.skip("emulates kernels that tests/gpu runs", allow_module_level=True)

TOLERANCE = 2e-2
"""Triton's interpreter cuts off what does not fit into bfloat16."""
TILES = [GroupedTile(4, 16, 1), GroupedTile(3, 1, 0), GroupedTile(4, 2, 2)]


@pytest.fixture(params=[1, 5])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many programs, one after the other."""

    def launch(
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor, ...],
        fixed: tuple[int, ...],
        free: tuple[int, ...],
        constants: tuple[Any, ...],
        warps: int,
        tiled: tuple[Tiled, ...],
    ) -> None:
        assert 0 < grid[0] <= request.param
        matrices = [one.matrix.float().numpy().copy() for one in tiled]
        gluon_emulator.run(
            hopper_grouped,
            "_grouped_kernel",
            grid[0],
            *matrices,
            *(gluon_emulator.Pointer(tensor.numpy()) for tensor in tensors),
            *fixed,
            *free,
            *constants,
            needs=(hopper_gated, hopper_slots),
        )
        tiled[-1].matrix.copy_(torch.from_numpy(matrices[-1]))

    monkeypatch.setattr(hopper_grouped, "_grouped", launch)
    monkeypatch.setattr(hopper_grouped, "processors", lambda device: request.param)


def filled(count: int) -> int:
    return -(-count // 64) * 64


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("tokens", "counts", "shared", "width", "inner"),
    [
        (70, [70, 0, 1, 64, 65, 0], 0, 64, 128),
        (130, [0, 130, 129, 1, 0], 1, 136, 72),
        (260, [3, 0, 0, 257, 260], 2, 264, 200),
        (1, [0, 0], 2, 72, 136),
    ],
)
def test_products_are_what_they_are_defined_as(
    tokens: int, counts: list[int], shared: int, width: int, inner: int, tile: GroupedTile, emulated: None
) -> None:
    routed = len(counts)
    total, most = sum(map(filled, counts)), routed + 3
    normed, rows = torch.randn(tokens, width), Rows(tokens, routed, shared, most * 8, most * 4)
    gate_up = torch.randn(routed + shared, 2 * inner, width) / width**0.5
    down = torch.randn(routed + shared, width, inner) / inner**0.5
    spread = torch.randn(rows.total(0), width)
    sizes = torch.tensor(counts + [tokens] * shared, dtype=torch.int32)
    gated = hopper_grouped.gate_up(
        spread, normed, gate_up, sizes, rows, torch.full((rows.total(shared), inner), torch.nan), tile
    )
    first = filled(tokens)
    output = torch.full((rows.total(min(shared, 1)), width), torch.nan)
    hopper_grouped.down(gated, down, sizes, rows, output, tile)

    def expected(x: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = (x @ gate_up[expert].t()).chunk(2, dim=1)
        return silu(gate) * up, (silu(gate) * up) @ down[expert].t()

    sums = torch.zeros(tokens, width)
    for number in range(shared):
        inside, product = expected(normed, routed + number)
        sums += product
        np.testing.assert_allclose(gated[number * first :][:tokens], inside, rtol=1e-3, atol=1e-4)
    if shared:
        np.testing.assert_allclose(output[:tokens], sums, rtol=1e-3, atol=1e-4)
    begin = 0
    for expert, count in enumerate(counts):
        inside, product = expected(spread[begin : begin + count], expert)
        np.testing.assert_allclose(gated[shared * first + begin :][:count], inside, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(output[min(shared, 1) * first + begin :][:count], product, rtol=1e-3, atol=1e-4)
        begin += filled(count)
    assert begin == total
    assert output[min(shared, 1) * first + total :].isnan().all(), "wrote behind the last expert's rows"


@pytest.mark.parametrize(
    ("shape", "padding"),
    [
        (Shape(16, 96, 48, 16, 4, 1), 16),
        (Shape(70, 72, 40, 20, 3, 2), 9),
        (Shape(80, 32, 16, 16, 2, 0), 0),
    ],
)
@pytest.mark.parametrize("emulated", [5], indirect=True)
def test_mixture(shape: Shape, padding: int, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ExpertCase(shape, DEVICE, padding)
    monkeypatch.setattr(grouped, "FEWEST_TOKENS", 0)
    monkeypatch.setattr(grouped, "_hopper_kernel", lambda device: hopper_grouped)
    monkeypatch.setattr(mixture, "MOST_FEW", 0)
    result = mixture.mixture(case.hidden, case.gain, EPS, case.router, case.stacks, case.batch)
    real, expected = case.real, case.expected_of(case.router)
    assert not real.numel() or distance(result[real], expected[real]) < TOLERANCE
    monkeypatch.setattr(grouped, "FEWEST_TOKENS", 1 << 20)
    other = mixture.mixture(case.hidden, case.gain, EPS, case.router, case.stacks, case.batch)
    assert not real.numel() or distance(other[real], result[real]) < TOLERANCE


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("tokens", [1, 64, 150])
def test_places_of_pairs(tokens: int) -> None:
    experts = torch.rand(tokens, 14).topk(5, dim=1).indices.int()
    experts[torch.rand(tokens) < 0.1] = -1
    counts, places = place_pairs(experts, 14, 16)
    numbers = experts.flatten()
    assert torch.equal(counts.long(), torch.bincount(numbers[numbers >= 0].long(), minlength=14))
    begin = 0
    for expert in range(14):
        own = places[numbers == expert]
        assert torch.equal(own, torch.arange(begin, begin + own.shape[0], dtype=torch.int32))
        begin += -(-own.shape[0] // 16) * 16


LAUNCHES = """
import torch
from engines.kernels import PackedExperts, PackedLinear, RmsNorm, Router, RoutingRule
from engines.kernels.cuda import grouped
from engines.kernels.cuda.device import rehearse_on
from engines.kernels.cuda.launch import Launcher
from engines.kernels.cuda.tuning import Machine
from engines.kernels.experts import Stacks, mixture
from engines.models.batch import Batch

grouped.FEWEST_TOKENS = 400
rehearse_on(Machine("NVIDIA H200", {capability}, 132, 233_472))
def empty(*sizes, dtype=torch.bfloat16):
    return torch.empty(*sizes, dtype=dtype, device="meta")
stacks = Stacks(empty(66, 2 * {inner}, 256), empty(66, 256, {inner}), 6, 2)
router = Router(PackedLinear(empty(64, 256, dtype=torch.float32), "plain", 64, 256), None, RoutingRule(6))
for tokens in (300, 400):
    names = []
    Launcher.recorder = lambda launched: names.append(launched.name)
    integers = empty(tokens, dtype=torch.int64)
    batch = Batch(integers, integers, integers, integers, integers, integers, None, 1, 1)
    packed = PackedExperts((), (), None, stacks)
    mixture(empty(tokens, 256), RmsNorm(empty(256), 1e-6), router, packed, batch)
    print(*names[-4:])
"""
BY_TRITON = "_place_kernel _gate_up_kernel _down_kernel _combine_kernel"
FOR_HOPPER = "_spread_kernel _grouped_kernel _grouped_kernel _sum_kernel"
HERE = FOR_HOPPER if version("triton").startswith(device.GLUON_TRITON) else BY_TRITON


@pytest.mark.parametrize(
    ("capability", "inner", "kernels"),
    [((9, 0), 136, HERE), ((9, 0), 140, BY_TRITON), ((8, 0), 136, BY_TRITON)],
)
def test_steps_of_many_tokens_take_them_where_they_run(capability: tuple[int, int], inner: int, kernels: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LAUNCHES.format(capability=capability, inner=inner)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.splitlines() == [BY_TRITON, kernels]
