"""The logic of the attention kernel for Hopper, run with NumPy; on the GPU see tests/gpu/test_attention_gpu.py."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from engines.kernels import reference
from tests import gluon_emulator
from tests.unit.kernels.paged import PagedCache, Row

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from engines.kernels.cuda import hopper_attention, hopper_persistent, hopper_tiles
from engines.kernels.cuda.attention import LOG2_E
from engines.kernels.cuda.hopper_attention import LINES, WIDTH

SHORT = [(5, 5)] * 260
SOME = [(1, 1), (31, 1), (127, 127), (129, 129), (21, 16), (357, 257), (132, 3)]


def expect_definition(
    module: ModuleType, kernel: str, heads: int, kv_heads: int, rows: list[tuple[int, int]], known: bool,
    tile: tuple[int, ...], programs: int | None,
) -> None:  # fmt: skip
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
    scale, group = WIDTH**-0.5, heads // kv_heads
    matrices = [tensor.flatten(0, 1).flatten(1).numpy() for tensor in paged.tensors]
    pointers = [queries, output, starts, batch.context_lengths, tables, lines]
    drawn = torch.zeros(1, dtype=torch.int32)
    walking = module is hopper_persistent
    if walking:
        pointers.append(drawn)
    gluon_emulator.run(
        module,
        kernel,
        programs or kv_heads * (tokens * group // LINES + len(rows)),
        *matrices,
        *(gluon_emulator.Pointer(tensor.numpy()) for tensor in pointers),
        *(heads * WIDTH, WIDTH, len(rows), 0, tables.shape[1], int(not known), scale * LOG2_E),
        *(group, kv_heads, 16, *tile, True, 240, 24),
        needs=(hopper_attention, hopper_tiles) if walking else (),
    )
    assert drawn.item() == 0
    expected = reference.attention(queries, paged.keys, paged.values, batch, scale)
    if not known:
        singles = [int(starts[index]) for index, (_, count) in enumerate(rows) if count == 1]
        expected[singles] = torch.nan
    np.testing.assert_allclose(output.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("at_once", "stages"), [(128, 2), (64, 3)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows"), [(12, 2, SOME), (7, 1, SOME), (7, 1, [(300, 100)]), (1, 1, SHORT)]
)
@pytest.mark.parametrize("known", [True, False])
def test_chunks(heads: int, kv_heads: int, rows: list[tuple[int, int]], at_once: int, stages: int, known: bool) -> None:
    expect_definition(
        hopper_attention, "_hopper_kernel", heads, kv_heads, rows, known, (at_once, stages, 256), programs=None
    )


@pytest.mark.parametrize("programs", [1, 40])
@pytest.mark.parametrize(("at_once", "stages"), [(128, 2), (64, 3)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows"), [(12, 2, SOME), (7, 1, SOME), (7, 1, [(300, 100)]), (1, 1, SHORT[:90])]
)
@pytest.mark.parametrize("known", [True, False])
def test_chunks_of_programs_that_walk_over_tiles(
    heads: int, kv_heads: int, rows: list[tuple[int, int]], at_once: int, stages: int, programs: int, known: bool
) -> None:
    expect_definition(
        hopper_persistent, "_persistent_kernel", heads, kv_heads, rows, known, (at_once, stages, 256), programs
    )
