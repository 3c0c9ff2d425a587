"""The logic of latent decodes' attention for Hopper, run with NumPy, against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import gluon_emulator

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from engines.kernels.cuda import hopper_mla
from engines.kernels.cuda.attention import LOG2_E

SCALE, WIDTH, BLOCK = 0.15, 576, 16
CONTEXTS = [300, 65, 0, 64, 63, 17, 16, 15, 1]


def _run(
    contexts: list[int], counts: list[int], splits: int, programs: int, pieces: int, stages: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Partials, logs, the queries, (rows, 16, width), and the keys, (rows, longest, width) with NaN behind each end."""
    rows, per_row = len(contexts), -(-max(contexts) // BLOCK)
    cache = torch.randn(rows * per_row, BLOCK, WIDTH)
    tables = torch.randperm(rows * per_row).view(rows, per_row)
    for row, context in enumerate(contexts):
        own = cache[tables[row]].flatten(0, 1)
        own[context:] = torch.nan
        cache[tables[row]] = own.view(per_row, BLOCK, WIDTH)
    lines = torch.randperm(rows)
    shuffled = torch.zeros_like(tables)
    shuffled[lines] = tables
    starts = torch.tensor([0, *counts]).cumsum(0)
    queries = torch.randn(int(starts[-1]), 16, WIDTH) * 0.3
    partials, logs = torch.full((rows, splits, 16, 512), torch.nan), torch.full((rows, splits, 16), torch.nan)
    pointers = (partials, logs, starts, torch.tensor(contexts), shuffled, lines)
    gluon_emulator.run(
        hopper_mla,
        "hopper_attend_kernel",
        programs,
        *(tensor.view(-1, WIDTH).numpy() for tensor in (queries, cache)),
        *(gluon_emulator.Pointer(tensor.numpy()) for tensor in pointers),
        *(rows * splits, splits, per_row, SCALE * LOG2_E),
        *(BLOCK, 64, pieces, stages, True, splits == 1, True, 80),
    )
    firsts = queries[starts[:-1].clamp(max=queries.shape[0] - 1)]
    return partials, logs, firsts, cache[tables].flatten(1, 2)


def _check(found: tuple[torch.Tensor, ...], contexts: list[int], counts: list[int], splits: int) -> None:
    partials, logs, queries, keys = found
    expected, expected_logs = torch.full_like(partials, torch.nan), torch.full_like(logs, torch.nan)
    for row, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        size = (-(-context // splits) + 63) // 64 * 64
        for split in range(splits):
            own = keys[row, split * size : min((split + 1) * size, context)]
            if count == 1 and len(own):
                scores = queries[row] @ own.T * SCALE
                expected[row, split] = scores.softmax(-1) @ own[:, :512]
                expected_logs[row, split] = torch.logsumexp(scores, -1) * LOG2_E
    np.testing.assert_allclose(partials.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)
    if splits > 1:
        np.testing.assert_allclose(logs.numpy(), expected_logs.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("programs", [1, 4, 50])
@pytest.mark.parametrize(("pieces", "stages"), [(1, 2), (3, 7)])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_parts_of_rows(splits: int, pieces: int, stages: int, programs: int) -> None:
    """Whoever takes them; of rows without keys, and of those that are not single queries, nothing is written."""
    counts = [1, 1, 1, 1, 0, 1, 1, 3, 1]
    found = _run(CONTEXTS, counts, splits, programs, pieces, stages)
    _check(found, CONTEXTS, counts, splits)


def test_a_part_does_not_depend_on_the_rows_beside_it() -> None:
    torch.manual_seed(3)
    alone = _run([300], [1], 2, 1, 3, 7)
    torch.manual_seed(3)
    again = _run([300], [1], 2, 2, 3, 7)
    np.testing.assert_array_equal(alone[0].numpy(), again[0].numpy())
