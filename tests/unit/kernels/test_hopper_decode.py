"""The logic of the decode kernel for Hopper, run with NumPy; on the GPU see tests/gpu/test_attention_gpu.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from engines.kernels import GroupedQueries
from tests import gluon_emulator
from tests.attention_steps import MOST_POSITIONS, Step, padded, random_rows, random_shape
from tests.triton_interpreter import DEVICE

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from engines.kernels.cuda import hopper_attention, hopper_decode
from engines.kernels.cuda.attention import LOG2_E

CONTEXTS = [1, 2, 16, 17, 64, 65, 66, 129, 130, 577, 900]


def attention(heads: int, kv_heads: int, normed: bool) -> GroupedQueries:
    """With all dims rotated."""
    angles = torch.rand(MOST_POSITIONS, 64, device=DEVICE) * 6
    shape = random_shape(heads, kv_heads, 128, torch.float32, normed)
    return dataclasses.replace(shape, cos_sin=torch.cat([angles.cos(), angles.sin()], dim=1))


@pytest.mark.parametrize(("splits", "stages"), [(1, 3), (2, 3), (3, 2), (5, 1), (16, 6)])
@pytest.mark.parametrize(("heads", "kv_heads", "normed"), [(12, 2, False), (7, 1, True), (8, 2, False), (16, 1, True)])
def test_decode(heads: int, kv_heads: int, normed: bool, splits: int, stages: int) -> None:
    """Rows of all lengths, and two of padding; whoever arrives last puts a row together."""
    shape = attention(heads, kv_heads, normed)
    step = Step(random_rows(CONTEXTS), shape, torch.float32)
    rows, group = len(CONTEXTS) + 2, heads // kv_heads
    batch = padded(step, rows, rows, widest=60)
    assert batch.table_rows is not None
    qkv = torch.full((rows, step.qkv.shape[1]), torch.nan)
    qkv[: len(CONTEXTS)] = step.qkv
    output = torch.full((rows, heads * 128), torch.nan)
    partials = torch.full((rows * kv_heads * splits * group, 128), torch.nan)
    logs, arrivals = torch.full((rows * kv_heads * splits * group,), torch.nan), torch.zeros(rows * kv_heads)
    keys, values = (tensor.cpu() for tensor in step.cache)
    gains = [torch.ones(1) if norm is None else norm.weight.cpu() for norm in (shape.query_norm, shape.key_norm)]
    tensors = [qkv, keys, values, output, partials, logs, arrivals, batch.context_lengths, batch.cache_slots]
    tensors += [batch.block_tables, batch.table_rows, shape.cos_sin.cpu(), *gains]
    gluon_emulator.run(
        hopper_decode,
        "_decode_kernel",
        rows * kv_heads * splits,
        *(tensor.flatten(0, 1).flatten(1).numpy() for tensor in (keys, values)),
        *(gluon_emulator.Pointer(tensor.numpy()) for tensor in tensors),
        *(qkv.stride(0), 128, splits, batch.block_tables.shape[1], shape.scale * LOG2_E, 1e-6),
        *(group, kv_heads, stages, 16, 16, normed, True, True),
        needs=(hopper_attention,),
    )
    step.cache = keys, values
    np.testing.assert_allclose(output[: len(CONTEXTS)].numpy(), step.expected().numpy(), rtol=1e-4, atol=1e-4)
    assert output[len(CONTEXTS) :].isnan().all()
    step.check_cache()
    assert not arrivals.any()


@pytest.mark.parametrize(
    ("rows", "kv_heads", "longest", "expected"), [(1, 2, 4096, 16), (64, 2, 4096, 2), (256, 2, 4096, 1), (4, 4, 100, 2)]
)
def test_splits_fill_the_device(rows: int, kv_heads: int, longest: int, expected: int) -> None:
    assert hopper_decode.choose_splits(rows, kv_heads, longest, 2 * 132) == expected
