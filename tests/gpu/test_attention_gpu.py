"""Attention over paged caches on the GPU against its definition in float64: eager and in captured graphs."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

import pytest
import torch

from engines import kernels
from engines.models.batch import Batch
from tests.attention_steps import MOST_POSITIONS, Step, close, padded, random_rows, random_shape, to_device
from tests.triton_interpreter import DEVICE
from tests.unit.kernels.paged import Row

pytest.importorskip("triton")

from engines.kernels.cuda import decode_attention, device, prefill_attention
from engines.kernels.cuda.scratch import counters

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = [
    (12, 2, 128, False, torch.bfloat16),
    (28, 4, 128, True, torch.bfloat16),
    (9, 3, 64, False, torch.float16),
    (5, 1, 256, True, torch.bfloat16),
    (32, 2, 80, False, torch.bfloat16),
    (6, 2, 128, True, torch.float32),
]
"""Query heads, key/value heads, their width, whether they are normed, type."""


def some_contexts() -> list[int]:
    return [1, 2, 16, 17, 63, 64, 65, 129, *(random.randrange(1, 1500) for _ in range(5))]


@pytest.mark.parametrize(("heads", "kv_heads", "width", "normed", "dtype"), CASES)
def test_decode(heads: int, kv_heads: int, width: int, normed: bool, dtype: torch.dtype) -> None:
    for contexts in (some_contexts(), [random.randrange(900, 3000)], [random.randrange(1, 300) for _ in range(70)]):
        step = Step(random_rows(contexts), random_shape(heads, kv_heads, width, dtype, normed), dtype)
        result = kernels.grouped_query_attention(step.qkv.to(DEVICE), step.shape, step.cache, to_device(step.batch))
        assert close(result, step.expected())
        step.check_cache()


@pytest.mark.parametrize(
    ("splits", "keys", "warps"), [(1, 32, 2), (3, 32, 2), (1, 64, 4), (2, 64, 4), (64, 64, 4), (64, 16, 1), (7, 128, 8)]
)
def test_decode_in_every_division(splits: int, keys: int, warps: int) -> None:
    step = Step(random_rows(some_contexts()), random_shape(12, 2, 128, torch.bfloat16), torch.bfloat16)
    tile = decode_attention.DecodeTile(keys, warps)
    cache = step.cache[0], step.cache[1]
    result = decode_attention.attend_fused(
        step.qkv.to(DEVICE), step.shape, cache, to_device(step.batch), tile=tile, splits=splits
    )
    assert close(result, step.expected())
    step.check_cache()
    assert not counters(DEVICE).arrivals.any()
    assert not counters(DEVICE).drawn.any()


MIXED = [(40, 40), (2, 2), (300, 7), (520, 520), (131, 2), (1500, 200)]
FP8_CASES = [case for case in CASES if case[4] is not torch.float32] + [(6, 2, 100, False, torch.float32)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "normed", "dtype"), [*FP8_CASES, (24, 1, 128, True, torch.bfloat16)]
)
def test_fp8_cache(heads: int, kv_heads: int, width: int, normed: bool, dtype: torch.dtype) -> None:
    """Decodes, few rows and more than are resident at once, and prompts beside them."""
    for contexts, prompts in (
        (some_contexts(), []),
        ([random.randrange(900, 3000)], []),
        ([random.randrange(1, 300) for _ in range(160)], []),
        (some_contexts(), MIXED),
        ([], [(2500, 2100)]),
    ):
        step = Step(
            random_rows(contexts, prompts), random_shape(heads, kv_heads, width, dtype, normed), dtype, fp8=True
        )
        result = kernels.grouped_query_attention(step.qkv.to(DEVICE), step.shape, step.cache, to_device(step.batch))
        assert close(result, step.expected(), fp8=True)
        step.check_cache()


@pytest.mark.parametrize(("heads", "kv_heads", "width", "normed", "dtype"), CASES)
def test_mixed_steps(heads: int, kv_heads: int, width: int, normed: bool, dtype: torch.dtype) -> None:
    for contexts, prompts in ((some_contexts(), MIXED), ([], MIXED[:2]), ([3], [(5, 5)])):
        step = Step(random_rows(contexts, prompts), random_shape(heads, kv_heads, width, dtype, normed), dtype)
        result = kernels.grouped_query_attention(step.qkv.to(DEVICE), step.shape, step.cache, to_device(step.batch))
        assert close(result, step.expected())
        step.check_cache()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of any size go to the kernel that else takes large ones."""
    if torch.cuda.get_device_capability() != device.HOPPER:
        pytest.skip("only Hopper has it")
    monkeypatch.setattr(prefill_attention, "HOPPER_TILES", 0.0)


LONG_PROMPTS = [(128, 128), (129, 129), (255, 127), (16, 15), (700, 700), (1029, 260), (21, 21), (2500, 2100), (2, 2)]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("heads", "kv_heads", "normed"), [(12, 2, False), (28, 4, False), (9, 3, True), (32, 2, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_prompts_on_hopper(heads: int, kv_heads: int, normed: bool, dtype: torch.dtype) -> None:
    for contexts, prompts in ((some_contexts(), LONG_PROMPTS), ([], LONG_PROMPTS[:3]), ([3], [(5, 5)])):
        step = Step(random_rows(contexts, prompts), random_shape(heads, kv_heads, 128, dtype, normed), dtype)
        result = kernels.grouped_query_attention(step.qkv.to(DEVICE), step.shape, step.cache, to_device(step.batch))
        assert close(result, step.expected())
        step.check_cache()


@pytest.mark.usefixtures("hopper")
def test_captured_mixed_steps_on_hopper() -> None:
    def make() -> list[Row]:
        counts = [random.randrange(2, 60) for _ in range(4)]
        decodes = [1000, *(random.randrange(1, 1000) for _ in range(8))]
        return random_rows(decodes, [(count + random.randrange(0, 900), count) for count in counts])

    replay_over_steps(same_sized(make, 300, 16))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("rows", [200, 256])
def test_many_short_prompts_on_hopper(rows: int) -> None:
    prompts = [(random.randrange(9, 60), random.randrange(2, 9)) for _ in range(rows)]
    step = Step(random_rows([], prompts), random_shape(12, 2, 128, torch.bfloat16), torch.bfloat16)
    result = kernels.grouped_query_attention(step.qkv.to(DEVICE), step.shape, step.cache, to_device(step.batch))
    assert close(result, step.expected())


def test_more_rows_than_a_program_looks_at_once() -> None:
    prompts = [(random.randrange(9, 60), random.randrange(2, 9)) for _ in range(300)]
    step = Step(random_rows([], prompts), random_shape(12, 2, 128, torch.bfloat16), torch.bfloat16)
    result = kernels.grouped_query_attention(step.qkv.to(DEVICE), step.shape, step.cache, to_device(step.batch))
    assert close(result, step.expected())


def captured(run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph, output


def replay_over_steps(steps: Sequence[tuple[Step, Batch]], fp8: bool = False) -> None:
    """Capture the first, replay for each after copying its inputs in; all have the same shapes and bounds."""
    first, batch = steps[0]
    tokens = batch.positions.shape[0]
    static = to_device(batch)
    shape, cache = first.shape, tuple(tensor.clone() for tensor in first.cache)
    qkv = torch.full((tokens, first.qkv.shape[1]), torch.nan, device=DEVICE, dtype=first.qkv.dtype)
    graph, output = captured(lambda: kernels.grouped_query_attention(qkv, shape, cache, static))
    for step, inputs in steps:
        assert (inputs.decode_rows, inputs.longest_context) == (batch.decode_rows, batch.longest_context)
        for field in dataclasses.fields(static):
            value = getattr(static, field.name)
            if isinstance(value, torch.Tensor):
                value.copy_(getattr(inputs, field.name))
        for _ in range(2):
            for ours, theirs in zip(cache, (*step.paged.tensors, step.scales), strict=False):
                ours.copy_(theirs)
            qkv.fill_(torch.nan)
            qkv[: step.qkv.shape[0]] = step.qkv.to(DEVICE)
            output.fill_(torch.nan)
            graph.replay()
        result = output[: step.qkv.shape[0]].clone()
        step.cache = cache
        assert close(result, step.expected(), fp8)
        step.check_cache()
    assert not counters(DEVICE).arrivals.any()
    assert not counters(DEVICE).drawn.any()


def same_sized(
    make_rows: Callable[[], list[Row]], tokens: int, rows: int, fp8: bool = False
) -> list[tuple[Step, Batch]]:
    """Steps of as many rows each, the longest always of one length, so that their caches have one size."""
    shape = dataclasses.replace(
        random_shape(12, 2, 128, torch.bfloat16), cos_sin=torch.rand(MOST_POSITIONS, 128, device=DEVICE)
    )
    steps = []
    for _ in range(3):
        step = Step(make_rows(), shape, torch.bfloat16, fp8=fp8)
        steps.append((step, padded(step, tokens, rows, widest=256)))
    return steps


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("rows", "capacity"), [(1, 1), (3, 4), (60, 64), (140, 256)])
def test_captured_decode(rows: int, capacity: int, fp8: bool) -> None:
    def make() -> list[Row]:
        return random_rows([1000, *(random.randrange(1, 1000) for _ in range(rows - 1))])

    replay_over_steps(same_sized(make, capacity, capacity, fp8), fp8)


@pytest.mark.parametrize("fp8", [False, True])
def test_captured_mixed_steps(fp8: bool) -> None:
    def make() -> list[Row]:
        counts = [random.randrange(2, 60) for _ in range(4)]
        decodes = [1000, *(random.randrange(1, 1000) for _ in range(8))]
        return random_rows(decodes, [(count + random.randrange(0, 900), count) for count in counts])

    replay_over_steps(same_sized(make, 300, 16, fp8), fp8)


def test_a_float32_row_gets_the_same_bits_alone_and_among_others() -> None:
    contexts = some_contexts()
    step = Step(random_rows(contexts), random_shape(12, 2, 128, torch.float32), torch.float32)
    whole = kernels.grouped_query_attention(step.qkv.to(DEVICE), step.shape, step.cache, to_device(step.batch))
    for index, row in enumerate(step.rows):
        alone = dataclasses.replace(step.paged.batch([row]), cache_slots=step.slots[index : index + 1])
        part = kernels.grouped_query_attention(
            step.qkv[index : index + 1].to(DEVICE), step.shape, step.cache, to_device(alone)
        )
        assert torch.equal(part, whole[index : index + 1])
