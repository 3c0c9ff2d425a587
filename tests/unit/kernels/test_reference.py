"""The definitions, held against published vectors, torch's own functions and plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from engines.kernels import reference
from tests.unit.kernels.paged import PagedCache, Row

KNOWN_ANSWERS = [
    (("00000000", "00000000"), ("00000000",) * 4, ("6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8")),
    (("ffffffff", "ffffffff"), ("ffffffff",) * 4, ("408f276d", "41c83b0e", "a20bc7c6", "6d5451fd")),
    (
        ("a4093822", "299f31d0"),
        ("243f6a88", "85a308d3", "13198a2e", "03707344"),
        ("d16cfe09", "94fdcceb", "5001e420", "24126ea1"),
    ),
]
"""Key, counter and output words of philox4x32-10 in Random123's kat_vectors."""


def words(texts: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([int(text, 16)]) for text in texts)


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(
    key: tuple[str, ...], counter: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    low, high = words(key)
    assert reference.philox_4x32((low, high), words(counter)) == words(expected)


def test_noise_reads_seed_choice_position_and_token_where_the_contract_says() -> None:
    seed, choice, position, token = 0x299F31D0_A4093822, 3, 70000, 4 * 11 + 2
    noise = reference.gumbel_noise(torch.tensor([seed]), torch.tensor([choice]), torch.tensor([position]), 64)
    counter = tuple(torch.tensor([word]) for word in (11, position, choice, 0))
    lanes = reference.philox_4x32((torch.tensor([0xA4093822]), torch.tensor([0x299F31D0])), counter)
    uniform = ((int(lanes[2]) >> 8) + 0.5) / 2**24
    assert noise[0, token].item() == pytest.approx(-math.log(-math.log(uniform)), rel=1e-6)


def test_noise_of_one_row_does_not_depend_on_the_others() -> None:
    seeds, choices, positions = torch.tensor([5, -1, 5]), torch.tensor([0, 0, 1]), torch.tensor([9, 9, 9])
    together = reference.gumbel_noise(seeds, choices, positions, 1001)
    for row in range(3):
        alone = reference.gumbel_noise(seeds[row : row + 1], choices[row : row + 1], positions[row : row + 1], 1001)
        assert torch.equal(together[row], alone[0])
    assert len({float(value) for value in together[:, 17]}) == 3


def test_noise_is_gumbel_distributed() -> None:
    noise = reference.gumbel_noise(torch.tensor([42]), torch.tensor([0]), torch.tensor([0]), 1 << 18)[0].double()
    for point in (-1.5, -0.5, 0.0, 1.0, 3.0, 6.0):
        share = (noise < point).double().mean().item()
        assert share == pytest.approx(math.exp(-math.exp(-point)), abs=0.004)


def test_rms_norm_is_torchs() -> None:
    x, weight = torch.randn(5, 48), torch.randn(48)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), functional.rms_norm(x, (48,), weight, 1e-5))


def test_silu_mul_gates_with_the_first_half() -> None:
    gate, up = torch.randn(4, 10), torch.randn(4, 10)
    expected = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(reference.silu_mul(torch.cat([gate, up], dim=1)), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_each_pair_by_its_angle_and_leaves_the_rest(interleaved: bool) -> None:
    angles = torch.rand(32, 6) * 6
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    queries, keys, positions = torch.randn(3, 4, 20), torch.randn(3, 2, 20), torch.tensor([4, 31, 0])
    turned, turned_keys = queries.clone(), keys.clone()
    reference.rope_(turned, turned_keys, positions, table, interleaved)
    for before, after in ((queries, turned), (keys, turned_keys)):
        for pair in range(6):
            i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 6)
            turn = torch.polar(torch.ones(3), angles[positions, pair]).unsqueeze(1)
            expected = torch.complex(before[..., i], before[..., j]) * turn
            torch.testing.assert_close(torch.complex(after[..., i], after[..., j]), expected)
        assert torch.equal(before[..., 12:], after[..., 12:])


def test_write_cache_fills_its_slots_and_no_other() -> None:
    cache = torch.zeros(4, 8, 2, 3)
    entries, slots = torch.randn(3, 2, 3), torch.tensor([9, 31, 0])
    reference.write_cache(entries, cache, slots)
    flat = cache.view(-1, 2, 3)
    assert torch.equal(flat[slots], entries)
    flat[slots] = 0
    assert not cache.any()


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
def test_attention_is_softmax_over_the_rows_own_tokens(heads: tuple[int, int]) -> None:
    query_heads, kv_heads = heads
    cache = PagedCache(3, 37, [(kv_heads, 16), (kv_heads, 16)], 8, torch.float32)
    rows = [Row(2, 37, 1), Row(0, 9, 1), Row(1, 20, 7)]
    queries = torch.randn(9, query_heads, 16)
    batch = cache.batch(rows)
    result = reference.attention(queries, cache.keys, cache.values, batch, 0.3)
    token = 0
    for row in rows:
        keys, values = (
            tensor.view(-1, kv_heads, 16)[cache.slots(row.sequence, row.context)].repeat_interleave(
                query_heads // kv_heads, dim=1
            )
            for tensor in cache.tensors
        )
        for context in range(row.context - row.count + 1, row.context + 1):
            scores = torch.einsum("hd,shd->hs", queries[token], keys[:context]) * 0.3
            expected = torch.einsum("hs,shd->hd", scores.softmax(dim=-1), values[:context])
            torch.testing.assert_close(result[token], expected, rtol=1e-4, atol=1e-5)
            token += 1
    padded = reference.padded_attention(queries, cache.keys, cache.values, batch, 0.3)
    torch.testing.assert_close(padded, result, rtol=1e-4, atol=1e-5)


def test_padded_attention_never_reads_what_was_not_written() -> None:
    cache = PagedCache(3, 50, [(2, 16), (2, 16)], 8, torch.float32)
    rows = [Row(0, 3, 1), Row(1, 50, 9), Row(2, 12, 12)]
    tensors = cache.forget_after(2, 12)
    batch, queries = cache.batch(rows), torch.randn(22, 4, 16)
    result = reference.padded_attention(queries, tensors[0], tensors[1], batch, 0.25)
    assert not result.isnan().any()
    torch.testing.assert_close(
        result, reference.attention(queries, tensors[0], tensors[1], batch, 0.25), rtol=1e-4, atol=1e-5
    )
