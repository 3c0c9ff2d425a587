"""The logic of the attention kernel for Hopper, run with NumPy; on the GPU see tests/gpu/test_attention_gpu.py."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch

from engines.kernels import reference
from tests import gluon_emulator
from tests.unit.kernels.paged import PagedCache, Row

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from engines.kernels.cuda import device, hopper_attention, hopper_products, hopper_tiles
from engines.kernels.cuda.attention import LOG2_E
from engines.kernels.cuda.hopper_attention import MOST_ROWS, WIDTH

SHORT = [(5, 5)] * 90
SOME = [(1, 1), (31, 1), (127, 127), (129, 129), (21, 16), (357, 257), (132, 3)]


@pytest.mark.parametrize("programs", [1, 40])
@pytest.mark.parametrize(("at_once", "stages"), [(128, 2), (64, 3)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows"), [(12, 2, SOME), (7, 1, SOME), (7, 1, [(300, 100)]), (1, 1, SHORT)]
)
@pytest.mark.parametrize("known", [True, False])
def test_chunks(
    heads: int, kv_heads: int, rows: list[tuple[int, int]], at_once: int, stages: int, programs: int, known: bool
) -> None:
    """All rows where the host knows which they are; else those of one token are left to another kernel."""
    longest = max(context for context, _ in rows)
    paged = PagedCache(len(rows), longest, [(kv_heads, WIDTH)] * 2, 16, torch.float32)
    batch = paged.batch([Row(index, context, count) for index, (context, count) in enumerate(rows)])
    for index, (context, _) in enumerate(rows):
        for tensor in paged.tensors:
            tensor.flatten(0, 1)[paged.slots(index, longest)[context:]] = torch.nan
    starts, tokens = batch.query_starts, batch.positions.shape[0]
    queries, output = torch.randn(tokens, heads, WIDTH), torch.full((tokens, heads, WIDTH), torch.nan)
    lines = torch.randperm(len(rows))
    tables = torch.zeros_like(batch.block_tables)
    tables[lines] = batch.block_tables
    scale, drawn = WIDTH**-0.5, torch.zeros(1, dtype=torch.int32)
    pointers = (queries, output, starts, batch.context_lengths, tables, lines, drawn)
    gluon_emulator.run(
        hopper_attention,
        "_hopper_kernel",
        programs,
        *(tensor.flatten(0, 1).flatten(1).numpy() for tensor in paged.tensors),
        *(gluon_emulator.Pointer(tensor.numpy()) for tensor in pointers),
        *(heads * WIDTH, WIDTH, len(rows), 0, tables.shape[1], int(not known), scale * LOG2_E),
        *(heads // kv_heads, kv_heads, 16, at_once, stages, MOST_ROWS, True, 240, 24),
        needs=(hopper_tiles, hopper_products),
    )
    assert drawn.item() == 0
    expected = reference.attention(queries, paged.keys, paged.values, batch, scale)
    if not known:
        singles = [int(starts[index]) for index, (_, count) in enumerate(rows) if count == 1]
        expected[singles] = torch.nan
    np.testing.assert_allclose(output.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5, equal_nan=True)


LAUNCHES = """
import torch
from engines.kernels.cuda.device import rehearse_on
from engines.kernels.cuda.launch import Launcher
from engines.kernels.cuda.prefill_attention import attend_chunks
from engines.kernels.cuda.tuning import Machine
from engines.models.batch import Batch

rehearse_on(Machine("NVIDIA H200", (9, 0), 132, 233_472))
names = []
Launcher.recorder = lambda launched: names.append(launched.name)
for tokens, rows in {cases}:
    integers = torch.empty(rows + 1, dtype=torch.int32, device="meta")
    tables = torch.empty(rows, 8, dtype=torch.int32, device="meta")
    batch = Batch(*[integers] * 4, integers[1:], tables, decode_rows=0, longest_query=9, longest_context=9)
    queries = torch.empty(tokens, 12, 128, dtype=torch.bfloat16, device="meta")
    cache = (torch.empty(64, 16, 2, 128, dtype=torch.bfloat16, device="meta"),) * 2
    attend_chunks(queries, cache, batch, 1.0, torch.empty_like(queries))
print(*names)
"""


def test_it_serves_steps_of_many_tokens_and_not_more_rows_than_it_orders() -> None:
    cases = [(1407, 256), (1408, 256), (1408, 257)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LAUNCHES.format(cases=cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    large = "_hopper_kernel" if version("triton").startswith(device.GLUON_TRITON) else "_prefill_kernel"
    assert done.stdout.split() == ["_prefill_kernel", large, "_prefill_kernel"]
