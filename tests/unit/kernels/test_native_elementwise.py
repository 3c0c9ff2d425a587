"""Native norms, activation, rotary embedding, cache writes and noise, against the definitions."""

from __future__ import annotations

import pytest
import torch

from engines.kernels import reference
from engines.kernels.native import Native

TYPES = [torch.float32, torch.bfloat16]
WIDTHS = [1, 7, 16, 64, 80, 576, 9000]


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.dtype == expected.dtype
    tolerance = 2e-6 if expected.dtype is torch.float32 else 2**-7
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(native: Native, dtype: torch.dtype, width: int) -> None:
    weight = torch.randn(width).to(dtype)
    x = torch.randn(5, 2 * width + 3).to(dtype)[:, 1 : width + 1]
    close(native.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    heads = torch.randn(4, 6, width).to(dtype)[:, 1:4]
    close(native.rms_norm(heads, weight, 1e-5), reference.rms_norm(heads, weight, 1e-5))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul(native: Native, dtype: torch.dtype, width: int) -> None:
    gate_up = (torch.randn(3, 2 * width) * 6).to(dtype)
    gate_up[0, 0], gate_up[1, 0] = 200.0, -200.0
    close(native.silu_mul(gate_up), reference.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rope_dim"), [(64, 64), (80, 32), (128, 128), (20, 12)])
def test_rope(native: Native, dtype: torch.dtype, interleaved: bool, head_dim: int, rope_dim: int) -> None:
    angles = torch.rand(50, rope_dim // 2) * 6
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions = torch.randint(0, 50, (37,))
    mixed = torch.randn(37, 14, head_dim).to(dtype)
    expected = mixed.clone()
    reference.rope_(expected[:, :9], expected[:, 9:12], positions, table, interleaved)
    native.rope_(mixed[:, :9], mixed[:, 9:12], positions, table, interleaved)
    close(mixed, expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("cache_dtype", TYPES)
@pytest.mark.parametrize("shape", [(3, 64), (2, 21), (5,)])
def test_write_cache(native: Native, dtype: torch.dtype, cache_dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    mixed = torch.randn(6, 2 * shape[0], *shape[1:]).to(dtype)
    entries = mixed[:, shape[0] :]
    slots = torch.tensor([70, 3, 127, 0, 64, 5])
    cache = torch.full((8, 16, *shape), torch.nan, dtype=cache_dtype)
    expected = cache.clone()
    native.write_cache(entries, cache, slots)
    reference.write_cache(entries, expected, slots)
    assert torch.equal(cache.nan_to_num(99.0), expected.nan_to_num(99.0))
    assert int((~cache.isnan()).sum()) == entries.numel()


def test_rounding_to_sixteen_bits_is_torchs(native: Native) -> None:
    bits = torch.randint(-(2**31), 2**31, (4096, 16), dtype=torch.int32)
    numbers = bits.view(torch.float32)
    cache = torch.empty(256, 16, 16, dtype=torch.bfloat16)
    native.write_cache(numbers, cache, torch.arange(4096))
    expected = numbers.to(torch.bfloat16)
    assert torch.equal(cache.view(4096, 16).isnan(), expected.isnan())
    assert torch.equal(cache.view(4096, 16).nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize("vocab", [1, 61, 4097, 49152])
def test_noise_is_the_definitions(native: Native, vocab: int) -> None:
    seeds = torch.tensor([0, -1, 2**62 + 12345, 77])
    choices, positions = torch.tensor([0, 3, 1, 2**31]), torch.tensor([0, 4096, 2**20, 5])
    expected = reference.gumbel_noise(seeds, choices, positions, vocab)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        noise = native.gumbel_noise(seeds, choices, positions, vocab)
        torch.testing.assert_close(noise, expected, rtol=2e-6, atol=2e-6)
    alone = native.gumbel_noise(seeds[2:3], choices[2:3], positions[2:3], vocab)
    assert torch.equal(alone[0], noise[2])


def test_noise_is_right_at_both_ends_of_its_range(native: Native) -> None:
    """A few million draws reach the smallest and largest u, which float32 alone cannot tell from 0 and 1."""
    seeds = torch.arange(40)
    zeros = torch.zeros_like(seeds)
    noise = native.gumbel_noise(seeds, zeros, zeros, 1 << 17)
    expected = reference.gumbel_noise(seeds, zeros, zeros, 1 << 17)
    assert noise.max() > 14
    assert noise.min() < -2.6
    torch.testing.assert_close(noise, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_row_does_not_depend_on_the_others(native: Native, rows: int) -> None:
    x, weight = torch.randn(rows, 576), torch.randn(576)
    gate_up = torch.randn(rows, 1100)
    normed, activated = native.rms_norm(x, weight, 1e-5), native.silu_mul(gate_up)
    torch.set_num_threads(2)
    assert torch.equal(native.rms_norm(x, weight, 1e-5), normed)
    last = rows - 1
    assert torch.equal(native.rms_norm(x[last:], weight, 1e-5), normed[last:])
    assert torch.equal(native.silu_mul(gate_up[last:]), activated[last:])
