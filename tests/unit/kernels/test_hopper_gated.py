"""The logic of the gated kernel for Hopper, run with NumPy; on the GPU see tests/gpu/test_linear_gpu.py."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from tests import gluon_emulator

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from engines.kernels.cuda import device, hopper_gated
from engines.kernels.cuda.hopper_gated import GatedTile

TILES = [GatedTile(4, 16, 0), GatedTile(4, 16, 2), GatedTile(3, 1, 1)]


@pytest.mark.parametrize("programs", [1, 7])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("rows", "width", "depth"), [(1, 8, 8), (129, 128, 64), (500, 392, 200), (700, 136, 520)])
def test_is_what_gating_is_defined_as(rows: int, width: int, depth: int, tile: GatedTile, programs: int) -> None:
    x, weight = torch.randn(rows, depth), torch.randn(2 * width, depth) / depth**0.5
    x[::3] *= 100  # gates of which no power is a finite number
    output = np.full((rows, width), np.nan, np.float32)
    gluon_emulator.run(
        hopper_gated,
        "_gated_kernel",
        programs,
        *(x.numpy(), weight.numpy(), output, gluon_emulator.Pointer(output)),
        *(rows, width, depth),
        *(tile.stages, tile.band, tile.lag, 240, 24),
    )
    gate, up = (x @ weight.t()).chunk(2, dim=1)
    expected = (silu(gate) * up).numpy()
    np.testing.assert_allclose(output[1::3], expected[1::3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output[2::3], expected[2::3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output[::3], expected[::3], rtol=1e-4, atol=3e-2)


LAUNCHES = """
import torch
from engines.kernels import Fusion, linear, pack_linear
from engines.kernels.cuda import gated
from engines.kernels.cuda.device import rehearse_on
from engines.kernels.cuda.launch import Launcher
from engines.kernels.cuda.tuning import Machine

gated.FEWEST_WAVES = 4
rehearse_on(Machine("NVIDIA H200", {capability}, 132, 233_472))
weight = pack_linear(torch.empty({lines}, 1536, dtype=torch.bfloat16, device="meta"))
for rows in (300, 4096):
    names = []
    Launcher.recorder = lambda launched: names.append(launched.name)
    into = torch.empty(rows, {lines} // 2, dtype=torch.bfloat16, device="meta")
    x = torch.empty(rows, 1536, dtype=torch.bfloat16, device="meta")
    result = linear(x, weight, fusion=Fusion(gated=True, into=into))
    print(*names, result is into)
"""


FOR_HOPPER = "_gated_kernel" if version("triton").startswith(device.GLUON_TRITON) else "_silu_mul_kernel"


@pytest.mark.parametrize(
    ("capability", "lines", "kernel"),
    [((9, 0), 17920, FOR_HOPPER), ((9, 0), 17928, "_silu_mul_kernel"), ((8, 0), 17920, "_silu_mul_kernel")],
)
def test_layers_of_many_rows_are_gated_in_the_product_where_it_runs(
    capability: tuple[int, int], lines: int, kernel: str
) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LAUNCHES.format(capability=capability, lines=lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.splitlines() == ["_silu_mul_kernel True", f"{kernel} True"]
