"""The Triton kernels, and what stands in for them, against the definitions on fresh random inputs."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from engines import kernels
from engines.generation.sampler import Draws, Noise, draw
from engines.kernels import backends, reference, row_parameters
from engines.kernels.cuda.sampling import draw_rows
from engines.kernels.cuda.truncation import Truncates
from engines.models.batch import Batch
from tests.unit.kernels.paged import PagedCache, Row

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = torch.device("cuda")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of ||result - definition|| / ||definition||, the definition in float64."""
TYPES = list(TOLERANCE)


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "shared_triton", lambda: None)


def moved(batch: Batch) -> Batch:
    fields: dict[str, Any] = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    tensors = {name: value.to(DEVICE) for name, value in fields.items() if isinstance(value, torch.Tensor)}
    return Batch(**{**fields, **tensors})


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    assert result.shape == expected.shape
    return float((result.cpu().double() - expected).norm() / expected.norm())


def close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    return distance(result, expected) < TOLERANCE[result.dtype]


def test_triton_serves_this_device() -> None:
    assert kernels.triton_status().version is not None, kernels.triton_status().reason


class Case:
    """A step over a random cache, with the definition's result in float64."""

    def __init__(
        self, rows: list[Row], heads: int, token_shapes: list[tuple[int, ...]], block_size: int, dtype: torch.dtype
    ) -> None:
        cache = PagedCache(
            1 + max(row.sequence for row in rows),
            max(row.context for row in rows),
            token_shapes,
            block_size,
            dtype,
            seed=random.randrange(1 << 30),
        )
        # The cache goes on past a row's end with tokens of its sequence: one read too many shows.
        batch = cache.batch(rows)
        queries = torch.randn(batch.positions.shape[0], heads, token_shapes[0][-1]).to(dtype)
        self.scale = token_shapes[0][-1] ** -0.5
        self.cache = tuple(tensor.to(DEVICE) for tensor in cache.tensors)
        self.batch, self.queries = moved(batch), queries.to(DEVICE)
        self._host = cache, batch, queries.double()

    def expected(self, value_width: int | None = None) -> torch.Tensor:
        cache, batch, queries = self._host
        tensors = [tensor.double() for tensor in cache.tensors]
        if value_width is None:
            return reference.attention(queries, tensors[0], tensors[1], batch, self.scale)
        latents = tensors[0].unsqueeze(2)
        return reference.attention(queries, latents, latents[..., :value_width], batch, self.scale)


def random_rows(contexts: list[int], prompts: list[int]) -> list[Row]:
    """Decodes of these contexts, then prefill rows of these contexts and random counts, the first whole."""
    decodes = [Row(number, context, 1) for number, context in enumerate(contexts)]
    counts = [*prompts[:1], *(random.randrange(2, prompt + 1) for prompt in prompts[1:])]
    return decodes + [
        Row(len(contexts) + number, context, count)
        for number, (context, count) in enumerate(zip(prompts, counts, strict=True))
    ]


MIXED = ([1, 15, 16, 17, 255, 256, 257, 900, 2], [40, 2, 300, 700, 131])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "block_size"),
    [(12, 2, 128, 16), (4, 4, 64, 16), (9, 3, 64, 16), (40, 2, 80, 16), (4, 2, 16, 4), (2, 1, 256, 16)],
)
def test_attention(heads: int, kv_heads: int, width: int, block_size: int, dtype: torch.dtype) -> None:
    for contexts, prompts in (MIXED, (MIXED[0], []), ([], MIXED[1]), ([3], [5])):
        case = Case(random_rows(contexts, prompts), heads, [(kv_heads, width)] * 2, block_size, dtype)
        assert close(kernels.paged_attention(case.queries, case.cache, case.batch, case.scale), case.expected())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "width", "rest"), [(16, 512, 64), (5, 24, 8), (128, 512, 64)])
def test_latent_attention(heads: int, width: int, rest: int, dtype: torch.dtype) -> None:
    rows = random_rows([1, 17, 900, 400], [20, 150]) if heads < 100 else random_rows([300], [20])
    case = Case(rows, heads, [(width + rest,)], 16, dtype)
    result = kernels.mla_attention(case.queries, case.cache, case.batch, case.scale, width)
    assert close(result, case.expected(width))


def test_a_long_row_is_cut_and_put_together() -> None:
    case = Case(
        [Row(0, 9000, 1), Row(1, 4096, 1), Row(2, 4097, 1), Row(3, 10, 1)], 12, [(2, 128)] * 2, 16, torch.float32
    )
    assert close(kernels.paged_attention(case.queries, case.cache, case.batch, case.scale), case.expected())


def test_a_float32_row_gets_the_same_bits_alone_and_among_others_and_in_chunks() -> None:
    case = Case(random_rows(*MIXED), 12, [(2, 128)] * 2, 16, torch.float32)
    whole = kernels.paged_attention(case.queries, case.cache, case.batch, case.scale)
    cache, batch, _ = case._host
    starts = batch.query_starts.tolist()
    for index, row in enumerate(random_rows(*MIXED)[: len(MIXED[0])]):
        alone = moved(cache.batch([row]))
        query = case.queries[starts[index] : starts[index + 1]]
        assert torch.equal(
            kernels.paged_attention(query, case.cache, alone, case.scale), whole[starts[index] : starts[index + 1]]
        )
    # The first prefill row is a whole prompt of 40 tokens.
    first, sequence = starts[len(MIXED[0])], len(MIXED[0])
    for begin, end in ((0, 13), (13, 40)):
        chunk = moved(cache.batch([Row(sequence, end, end - begin)]))
        part = kernels.paged_attention(case.queries[first + begin : first + end], case.cache, chunk, case.scale)
        assert torch.equal(part, whole[first + begin : first + end])


@pytest.mark.usefixtures("without_triton")
@pytest.mark.parametrize("dtype", TYPES)
def test_padded_attention(dtype: torch.dtype) -> None:
    rows = [*random_rows(*MIXED), Row(20, 2500, 600)]
    case = Case(rows, 12, [(2, 64)] * 2, 16, dtype)
    assert close(kernels.paged_attention(case.queries, case.cache, case.batch, case.scale), case.expected())
    latent = Case(rows, 6, [(40,)], 16, dtype)
    result = kernels.mla_attention(latent.queries, latent.cache, latent.batch, latent.scale, 32)
    assert close(result, latent.expected(32))


def attention_workspace() -> int:
    """Bytes beside the output for one prompt of 4000 tokens and 30 short ones beside 200 decodes of 4000."""
    rows = [Row(0, 4000, 1)] * 200 + [Row(1, 4000, 4000)] + [Row(2, 10 + number, 9) for number in range(30)]
    cache = PagedCache(3, 4000, [(2, 128)] * 2, 16, torch.bfloat16)
    batch, tensors = moved(cache.batch(rows)), tuple(tensor.to(DEVICE) for tensor in cache.tensors)
    queries = torch.randn(batch.positions.shape[0], 12, 128, device=DEVICE, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = kernels.paged_attention(queries, tensors, batch, 0.1)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - output.nbytes


def test_one_long_row_beside_many_short_ones_takes_little_memory() -> None:
    assert attention_workspace() < 32 << 20


@pytest.mark.usefixtures("without_triton")
def test_padded_attention_takes_bounded_memory() -> None:
    assert attention_workspace() < 2 * reference.PADDED_BYTES


@pytest.mark.parametrize("dtype", TYPES)
def test_norms(dtype: torch.dtype) -> None:
    for shape in ((7, 1536), (1, 64), (5, 3, 128), (300, 5120)):
        x = torch.randn(*shape[:-1], shape[-1] + 32, device=DEVICE).to(dtype)[..., 16:-16]
        weight = torch.randn(shape[-1], device=DEVICE).to(dtype)
        expected = reference.rms_norm(x.cpu().float(), weight.cpu().float(), 1e-6).double()
        assert close(kernels.rms_norm(x, weight, 1e-6), expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_silu_mul(dtype: torch.dtype) -> None:
    for rows, width in ((1, 48), (65, 8960), (3, 1408)):
        gate_up = torch.randn(rows, 2 * width, device=DEVICE).to(dtype) * 3
        assert close(kernels.silu_mul(gate_up), reference.silu_mul(gate_up.cpu().float()).double())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "turned"), [(12, 2, 128, 128), (3, 3, 64, 32), (5, 1, 80, 80)])
def test_rope_and_cache_writes(
    heads: int, kv_heads: int, width: int, turned: int, interleaved: bool, dtype: torch.dtype
) -> None:
    qkv = torch.randn(9, heads + 2 * kv_heads, width, device=DEVICE).to(dtype)
    angles = torch.rand(50, turned // 2, device=DEVICE) * 6
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions, slots = torch.randint(50, (9,), device=DEVICE), torch.randperm(64, device=DEVICE)[:9]
    cache = tuple(torch.full((4, 16, kv_heads, width), torch.nan, device=DEVICE, dtype=dtype) for _ in range(2))

    wanted = qkv.clone()
    sizes = (heads, kv_heads, kv_heads)
    queries, keys, _ = wanted.split_with_sizes(sizes, dim=1)
    reference.rope_(queries, keys, positions, table, interleaved)
    alone, together = qkv.clone(), qkv.clone()
    queries, keys, _ = alone.split_with_sizes(sizes, dim=1)
    kernels.rope_(queries, keys, positions, table, interleaved)
    assert close(alone, wanted.cpu().double())

    turned_queries, unturned_keys, values = together.split_with_sizes(sizes, dim=1)
    kernels.rope_write_kv(turned_queries, unturned_keys, values, positions, table, interleaved, cache, slots)
    assert torch.equal(turned_queries, queries)
    written = tuple(torch.full_like(tensor, torch.nan) for tensor in cache)
    kernels.write_kv(keys, values, written, slots)
    for ours, others, entries in zip(cache, written, (keys, values), strict=True):
        assert torch.equal(ours.view(-1, kv_heads, width)[slots], entries)
        assert torch.equal(ours.nan_to_num(7.0), others.nan_to_num(7.0))
        assert int(ours.isnan().sum()) == (64 - 9) * kv_heads * width


def test_latents_are_written_to_their_slots() -> None:
    latents = torch.randn(9, 100, device=DEVICE)[:, 4:76]
    cache, slots = (torch.full((4, 16, 72), torch.nan, device=DEVICE),), torch.randperm(64, device=DEVICE)[:9]
    kernels.write_latent(latents, cache, slots)
    assert torch.equal(cache[0].view(-1, 72)[slots], latents)
    assert int(cache[0].isnan().sum()) == (64 - 9) * 72


def random_sources(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seeds, choices and positions."""
    seeds = torch.tensor([random.randrange(-(1 << 63), 1 << 63) for _ in range(rows)])
    return seeds.to(DEVICE), torch.randint(1 << 20, (rows,)).to(DEVICE), torch.randint(1000, (rows,)).to(DEVICE)


def test_noise_is_the_definitions() -> None:
    for vocab in (1, 5, 1023, 50001):
        sources = random_sources(6)
        ours, expected = kernels.gumbel_noise(*sources, vocab), reference.gumbel_noise(*sources, vocab)
        # The same 24 random bits and, but for the last one of a float, the same two logarithms.
        assert ours.shape == expected.shape
        assert torch.allclose(ours, expected, rtol=2e-7, atol=1e-7)
        assert float((ours != expected).float().mean()) < 1e-4


def random_draws(rows: int) -> Draws:
    """Rows of every kind that is not greedy, in the sampler's order."""

    def some(value: float, off: float) -> float:
        return value if random.random() < 0.5 else off

    def truncation() -> tuple[float, float, int]:
        top_k = int(some(random.choice((1, 20, 5000, 10**6)), 0))
        return some(random.uniform(0.05, 0.999), 1.0), some(random.uniform(1e-4, 0.3), 0.0), top_k

    columns = sorted((truncation() for _ in range(rows)), key=kind_of)
    kinds = [kind_of(column) for column in columns]
    top_p, min_p, top_k = zip(*columns, strict=True)
    return Draws(
        kind_starts=tuple(sum(kind < boundary for kind in kinds) for boundary in range(7)),
        noise=Noise(*random_sources(rows)),
        temperature=torch.rand(rows, device=DEVICE) + 0.3,
        top_p=torch.tensor(top_p, device=DEVICE, dtype=torch.float32),
        min_p=torch.tensor(min_p, device=DEVICE, dtype=torch.float32),
        top_k=torch.tensor(top_k, device=DEVICE),
        largest_top_k=max(top_k),
        any_min_p=any(min_p),
    )


def kind_of(column: tuple[float, float, int]) -> int:
    """PLAIN 1, MIN_P 2, TOP_K 3, TOP_K_TOP_P 4, TOP_P 5."""
    top_p, min_p, top_k = column
    if top_p < 1:
        return 4 if top_k else 5
    if top_k:
        return 3
    return 2 if min_p else 1


def lines_of(draws: Draws) -> torch.Tensor:
    """(rows, FIELDS) int32: what the drawing kernels read, with prompts of one token."""
    lines = torch.zeros((draws.top_p.shape[0], row_parameters.FIELDS), dtype=torch.int32, device=DEVICE)
    lines[:, row_parameters.SEED : row_parameters.SEED + 2] = draws.noise.seeds.view(torch.int32).view(-1, 2)
    lines[:, row_parameters.CHOICE], lines[:, row_parameters.PROMPT_LENGTH] = draws.noise.choices, 1
    lines[:, row_parameters.TOP_K] = draws.top_k
    floats = lines.view(torch.float32)
    floats[:, row_parameters.TEMPERATURE] = draws.temperature
    floats[:, row_parameters.TOP_P], floats[:, row_parameters.MIN_P] = draws.top_p, draws.min_p
    return lines


def drawn_by_kernels(logits: torch.Tensor, draws: Draws, rows: list[int]) -> torch.Tensor:
    """Of these rows only, drawn together."""
    slots = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    places = (draws.noise.positions[rows] + 1).int()
    drawn = torch.full((len(rows),), -7, device=DEVICE)
    tokens = torch.zeros((logits.shape[0], 1024), dtype=torch.int32, device=DEVICE)
    everything = Truncates(top_k=True, top_p=True, min_p=True)
    draw_rows(logits[rows], slots, places, lines_of(draws), tokens, drawn, everything)
    return drawn


@pytest.mark.parametrize("vocab", [700, 32000, 151936])
def test_draws_are_those_of_the_composed_sampler(vocab: int) -> None:
    rows, different = 64, 0
    for spread in (0.05, 1.0, 4.0):
        logits, draws = torch.randn(rows, vocab, device=DEVICE) * spread, random_draws(rows)
        ours = drawn_by_kernels(logits, draws, list(range(rows)))
        different += int((ours != draw(logits.clone(), draws)).sum())
    # A nucleus' last token may fall on either side when its mass is summed in another order.
    assert different <= 2


def test_a_rows_draw_does_not_depend_on_its_neighbours() -> None:
    logits, draws = torch.randn(24, 5000, device=DEVICE) * 2, random_draws(24)
    together = drawn_by_kernels(logits, draws, list(range(24)))
    for rows in ([5, 6, 23], *([row] for row in range(24))):
        assert torch.equal(drawn_by_kernels(logits, draws, rows), together[rows])
