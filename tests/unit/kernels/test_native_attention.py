"""Native attention: equal to the definition, and the same bits however a prompt is chunked."""

from __future__ import annotations

import pytest
import torch

from engines.kernels import reference
from engines.kernels.native import Native
from tests.unit.kernels.paged import PagedCache, Row

SHAPES = [
    # query heads, KV heads, head_dim, block_size
    (9, 3, 64, 16),
    (28, 4, 128, 32),
    (4, 4, 80, 16),
    (7, 1, 40, 4),
    (3, 3, 18, 16),
    (50, 1, 32, 16),
]
ROWS = [Row(0, 1, 1), Row(1, 33, 1), Row(2, 100, 1), Row(3, 70, 25), Row(4, 16, 16), Row(5, 100, 2)]
"""Decodes and prefill chunks mixed, with and without tokens before the chunk."""


def random_queries(rows: list[Row], heads: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(sum(row.count for row in rows), heads, width).to(dtype)


@pytest.mark.parametrize(("query_heads", "kv_heads", "head_dim", "block_size"), SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_is_the_definition(
    native: Native, query_heads: int, kv_heads: int, head_dim: int, block_size: int, threads: int
) -> None:
    cache = PagedCache(6, 100, [(kv_heads, head_dim)] * 2, block_size, torch.float32)
    batch, queries = cache.batch(ROWS), random_queries(ROWS, query_heads, head_dim)
    expected = reference.attention(queries, cache.keys, cache.values, batch, 0.2)
    torch.set_num_threads(threads)
    torch.testing.assert_close(
        native.attention(queries, cache.keys, cache.values, batch, 0.2), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("query_type", "cache_type"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_sixteen_bit_inputs_are_read_exactly_and_summed_in_float32(
    native: Native, query_type: torch.dtype, cache_type: torch.dtype
) -> None:
    cache = PagedCache(6, 100, [(3, 72)] * 2, 16, cache_type)
    batch, queries = cache.batch(ROWS), random_queries(ROWS, 9, 72, query_type)
    exact = reference.attention(queries.float(), cache.keys.float(), cache.values.float(), batch, 0.1)
    result = native.attention(queries, cache.keys, cache.values, batch, 0.1)
    assert result.dtype == query_type
    tolerance = 1e-5 if query_type is torch.float32 else 2**-8
    torch.testing.assert_close(result.float(), exact, rtol=tolerance, atol=1e-5)


def test_latent_attention_shares_one_key_and_value_among_all_heads(native: Native) -> None:
    cache = PagedCache(6, 100, [(72,)], 16, torch.float32)
    latents = cache.tensors[0].unsqueeze(2)
    for heads in (1, 5, 40):
        batch, queries = cache.batch(ROWS), random_queries(ROWS, heads, 72)
        expected = reference.attention(queries, latents, latents[..., :56], batch, 0.2)
        result = native.attention(queries, latents, latents[..., :56], batch, 0.2)
        assert result.shape == (queries.shape[0], heads, 56)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_queries_may_be_views(native: Native) -> None:
    cache = PagedCache(6, 100, [(3, 64)] * 2, 16, torch.float32)
    batch, packed = cache.batch(ROWS), torch.randn(46, 15, 64)
    views = packed[:, 2:11]
    result = native.attention(views, cache.keys, cache.values, batch, 0.2)
    assert torch.equal(result, native.attention(views.contiguous(), cache.keys, cache.values, batch, 0.2))


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(9, 3), (4, 4), (28, 1)])
def test_a_token_has_the_same_bits_however_the_prompt_is_chunked(
    native: Native, query_heads: int, kv_heads: int
) -> None:
    length = 75
    cache = PagedCache(6, length, [(kv_heads, 64)] * 2, 16, torch.float32)
    queries = random_queries([Row(0, length, length)], query_heads, 64)
    whole = native.attention(queries, cache.keys, cache.values, cache.batch([Row(0, length, length)]), 0.125)
    neighbours = [Row(sequence, 7 * sequence, 1) for sequence in range(1, 6)]
    for threads, chunk in ((1, 1), (1, 7), (2, 32), (2, 50)):
        torch.set_num_threads(threads)
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            tensors = cache.forget_after(0, end)
            mine = Row(0, end, end - start)
            alone = native.attention(queries[start:end], tensors[0], tensors[1], cache.batch([mine]), 0.125)
            assert torch.equal(alone, whole[start:end])
            step = torch.cat([random_queries(neighbours, query_heads, 64), queries[start:end]])
            among = native.attention(step, tensors[0], tensors[1], cache.batch([*neighbours, mine]), 0.125)
            assert torch.equal(among[len(neighbours) :], alone)


def test_block_size_does_not_change_a_bit(native: Native) -> None:
    row = Row(0, 61, 61)
    queries = random_queries([row], 6, 32)
    tokens = torch.randn(2, 61, 2, 32)
    results = []
    for block_size in (4, 16, 64):
        cache = PagedCache(1, 61, [(2, 32)] * 2, block_size, torch.float32)
        for tensor, entries in zip(cache.tensors, tokens, strict=True):
            tensor.view(-1, 2, 32)[cache.slots(0, 61)] = entries
        results.append(native.attention(queries, cache.keys, cache.values, cache.batch([row]), 0.2))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_scores_far_apart_do_not_overflow(native: Native) -> None:
    cache = PagedCache(6, 100, [(3, 64)] * 2, 16, torch.float32)
    batch, queries = cache.batch(ROWS), random_queries(ROWS, 9, 64) * 300
    expected = reference.attention(queries, cache.keys, cache.values, batch, 1.0)
    torch.testing.assert_close(
        native.attention(queries, cache.keys, cache.values, batch, 1.0), expected, rtol=1e-3, atol=1e-3
    )
