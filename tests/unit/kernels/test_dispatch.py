"""What the public functions do with and without the native library."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from engines import kernels
from engines.kernels import backends, reference
from tests.unit.kernels.paged import PagedCache, Row

FIND_RUNTIMES = """
from engines import kernels
import torch
packed = kernels.pack_linear(torch.randn(700, 64))
kernels.linear(torch.randn(30, 64), packed)
print(kernels.native_status().variant)
names = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(sum(name.rsplit("/", 1)[1].startswith(("libgomp", "libomp", "libiomp")) for name in names))
"""


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "native", None)


def test_the_library_brings_no_openmp_runtime_beside_torchs() -> None:
    done = subprocess.run([sys.executable, "-c", FIND_RUNTIMES], capture_output=True, text=True, check=True)
    variant, runtimes = done.stdout.split()
    if variant == "None":
        pytest.skip(kernels.native_status().reason)
    assert runtimes == "1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_in_every_type(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(70, 64).to(dtype), torch.randn(70).to(dtype)
    packed = kernels.pack_linear(weight)
    assert (packed.out_features, packed.in_features) == (70, 64)
    for rows in (1, 9):
        x = torch.randn(rows, 200).to(dtype)[:, 30:94]
        for used in (None, bias):
            expected = functional.linear(x.float(), weight.float(), None if used is None else used.float())
            tolerance = 1e-5 if dtype is torch.float32 else 0.02
            result = kernels.linear(x, packed, used)
            assert result.dtype == dtype
            torch.testing.assert_close(result.float(), expected, rtol=tolerance, atol=5 * tolerance)


def test_linear_does_what_stands_before_and_after_it() -> None:
    hidden, weight, down, gain = torch.randn(5, 64), torch.randn(96, 64), torch.randn(64, 48), torch.randn(64)
    norm = kernels.RmsNorm(gain, 1e-5)
    gated = kernels.linear(hidden, kernels.pack_linear(weight), None, kernels.Fusion(norm=norm, gated=True))
    result = kernels.linear(gated, kernels.pack_linear(down), None, kernels.Fusion(residual=hidden))
    gate, up = functional.linear(functional.rms_norm(hidden, (64,), gain, 1e-5), weight).chunk(2, dim=-1)
    expected = hidden + functional.linear(functional.silu(gate) * up, down)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("without_library")
def test_float32_rows_keep_their_bits_without_the_library() -> None:
    packed = kernels.pack_linear(torch.randn(96, 576))
    x, bias = torch.randn(40, 576), torch.randn(96)
    whole = kernels.linear(x, packed, bias)
    for rows in range(1, 41):
        assert torch.equal(kernels.linear(x[:rows], packed, bias), whole[:rows])


@pytest.mark.usefixtures("without_library")
def test_attention_keeps_its_bits_without_the_library() -> None:
    cache = PagedCache(3, 40, [(2, 32)] * 2, 16, torch.float32)
    queries = torch.randn(40, 4, 32)
    whole = kernels.paged_attention(queries, cache.tensors, cache.batch([Row(0, 40, 40)]), 0.2)
    step = torch.cat([torch.randn(1, 4, 32), queries[17:29]])
    among = kernels.paged_attention(step, cache.tensors, cache.batch([Row(1, 33, 1), Row(0, 29, 12)]), 0.2)
    assert torch.equal(among[1:], whole[17:29])


def run_everything() -> list[torch.Tensor]:
    """Each public function once, on the same inputs."""
    generator = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    cache = PagedCache(2, 20, [(2, 16)] * 2, 4, torch.float32)
    latent_cache = PagedCache(2, 20, [(24,)], 4, torch.float32)
    batch = cache.batch([Row(0, 20, 1), Row(1, 12, 5)])
    slots = cache.slots(0, 6)
    kernels.write_kv(rand(6, 2, 16), rand(6, 2, 16), cache.tensors, slots)
    kernels.write_latent(rand(6, 24), latent_cache.tensors, slots)
    queries, keys = rand(6, 4, 16), rand(6, 2, 16)
    kernels.rope_(queries, keys, batch.positions, rand(20, 16), interleaved=False)
    integers = torch.tensor([4, 5, 6])
    return [
        queries,
        keys,
        kernels.paged_attention(queries, cache.tensors, batch, 0.25),
        kernels.mla_attention(rand(6, 4, 24), latent_cache.tensors, cache_batch(latent_cache), 0.25, 16),
        kernels.rms_norm(rand(6, 48), rand(48), 1e-5),
        kernels.silu_mul(rand(6, 48)),
        kernels.gumbel_noise(integers, integers, integers, 33),
        *(tensor.nan_to_num(-1.0) for tensor in (*cache.tensors, *latent_cache.tensors)),
    ]


def cache_batch(cache: PagedCache) -> kernels.AttentionBatch:
    return cache.batch([Row(0, 20, 1), Row(1, 12, 5)])


def test_both_ways_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.native_status().variant is None:
        pytest.skip(kernels.native_status().reason)
    with_library = run_everything()
    monkeypatch.setattr(backends, "native", None)
    for result, expected in zip(with_library, run_everything(), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_types_that_the_library_lacks_run_the_definition() -> None:
    x, weight = torch.randn(4, 32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    assert torch.equal(kernels.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    mixed = kernels.rms_norm(x.float(), weight.to(torch.bfloat16), 1e-5)
    assert torch.equal(mixed, reference.rms_norm(x.float(), weight.to(torch.bfloat16), 1e-5))
