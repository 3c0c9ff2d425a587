"""The kernels of grouped-query attention against their definition, through Triton's interpreter without a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.attention_steps import Step, close, padded, random_rows, random_shape, to_device
from tests.triton_interpreter import DEVICE

pytest.importorskip("triton")

from engines.kernels.cuda import decode_attention, elementwise, prefill_attention
from engines.kernels.cuda.scratch import counters

CONTEXTS = [1, 17, 65, 130]
PROMPTS = [(40, 40), (2, 2), (90, 13)]


def chunks(step: Step, tokens: int | None = None, rows: int = 0) -> torch.Tensor:
    """Rotation, cache write and attention as a step runs them that is not all decodes; filled up if ``tokens``."""
    shape, batch = step.shape, step.batch
    qkv = step.qkv
    if tokens is not None:
        batch = padded(step, tokens, rows, widest=16)
        qkv = torch.full((tokens, qkv.shape[1]), torch.nan, dtype=qkv.dtype)
        qkv[: step.qkv.shape[0]] = step.qkv
    batch, parts = (
        to_device(batch),
        qkv.to(DEVICE, copy=True).view(-1, shape.heads + 2 * shape.kv_heads, shape.head_dim),
    )
    queries, keys, values = parts.split_with_sizes((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
    cache = step.cache
    elementwise.rope_write_kv(queries, keys, values, batch.positions, shape.cos_sin, False, cache, batch.cache_slots)
    return prefill_attention.paged_attention(queries, cache, batch, shape.scale).flatten(1)[: step.qkv.shape[0]]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "normed", "splits"),
    [(6, 2, 32, False, 1), (6, 2, 32, True, 3), (3, 1, 40, False, 2)],
)
def test_decode(heads: int, kv_heads: int, width: int, normed: bool, splits: int, fp8: bool) -> None:
    shape = random_shape(heads, kv_heads, width, torch.float16, normed)
    step = Step(random_rows(CONTEXTS), shape, torch.float16, fp8=fp8)
    capacity = len(CONTEXTS) + 2
    qkv = torch.full((capacity, step.qkv.shape[1]), torch.nan, dtype=torch.float16)
    qkv[: len(CONTEXTS)] = step.qkv
    for inputs, batch in ((step.qkv, step.batch), (qkv, padded(step, capacity, capacity, widest=16))):
        result = decode_attention.attend_fused(
            inputs.to(DEVICE), step.shape, step.cache, to_device(batch), splits=splits
        )
        assert close(result[: len(CONTEXTS)], step.expected(), fp8)
        step.check_cache()
    assert not counters(DEVICE).arrivals.any()


@pytest.mark.parametrize("splits", [1, 3])
def test_decode_through_shared_memory(splits: int) -> None:
    step = Step(random_rows([1, 300, 17, 16, 65, 2]), random_shape(6, 2, 32, torch.float16), torch.float16)
    tile = decode_attention.DecodeTile(16, 4, stages=3)
    result = decode_attention.attend_fused(
        step.qkv.to(DEVICE), step.shape, step.cache, to_device(step.batch), tile, splits
    )
    assert close(result, step.expected())
    step.check_cache()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 32), (3, 1, 40)])
def test_chunks_beside_decodes(heads: int, kv_heads: int, width: int, fp8: bool) -> None:
    shape = random_shape(heads, kv_heads, width, torch.float16)
    step = Step(random_rows(CONTEXTS, PROMPTS), shape, torch.float16, fp8=fp8)
    assert close(chunks(step), step.expected(), fp8)
    step.check_cache()
    assert close(chunks(step, tokens=64, rows=9), step.expected(), fp8)
    step.batch = dataclasses.replace(step.batch, decode_rows=0)
    assert close(chunks(step), step.expected(), fp8)


@pytest.mark.parametrize(
    ("rows", "kv_heads", "longest", "expected"),
    [(1, 2, 4096, 64), (1, 2, 600, 10), (64, 2, 4096, 2), (256, 4, 4096, 1)],
)
def test_splits_fill_the_device_once(rows: int, kv_heads: int, longest: int, expected: int) -> None:
    assert decode_attention.choose_splits(rows, kv_heads, longest, 2 * 132, 64) == expected
