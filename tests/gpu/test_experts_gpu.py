"""Expert layers and decodes of latent attention at the sizes of V2-Lite, eager and in captured graphs."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch

from engines import kernels
from engines.kernels import RmsNorm
from engines.kernels.cuda.device import runs_gluon
from engines.kernels.cuda.mixture import sorted_mixture
from engines.kernels.experts import mixture
from tests.expert_cases import EPS, ExpertCase, Shape
from tests.latent_cases import LatentCase, Widths

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = torch.device("cuda", 0)
TOLERANCE = 8e-3
FP8_TOLERANCE = 2e-2
"""A number that lies between two of e4m3 may go either way."""
"""Of ||result - definition|| / ||definition||."""
V2_LITE = Widths(16, 128, 128, 512, 64, True)


def captured(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = run()
    torch.cuda.synchronize()

    def replay() -> torch.Tensor:
        graph.replay()
        torch.cuda.synchronize()
        return result

    return replay


@pytest.fixture(scope="module")
def layer() -> ExpertCase:
    return ExpertCase(Shape(1, 2048, 1408, 64, 6, 2), DEVICE)


@pytest.mark.parametrize(
    ("tokens", "uniform"),
    [
        (1, None),
        (1, 7),
        (2, 7),
        (5, 7),
        (16, None),
        (17, None),
        (64, None),
        (100, 7),
        (256, None),
        (257, 7),
        (3000, None),
    ],
)
def test_mixture(tokens: int, uniform: int | None, layer: ExpertCase) -> None:
    case = ExpertCase(Shape(tokens, 2048, 1408, 64, 6, 2), DEVICE, padding=tokens // 5, stacks=layer.stacks)
    router = case.with_rule(uniform_layer=uniform)
    packed = kernels.PackedExperts((), (), None, case.stacks)

    def run() -> torch.Tensor:
        return mixture(case.hidden, RmsNorm(case.gain, EPS), router, packed, case.batch)

    eager, real = run(), case.real
    expected = case.expected_of(router)
    assert float((eager[real].double() - expected[real].double()).norm() / expected[real].double().norm()) < TOLERANCE
    assert torch.equal(eager[real], run()[real])
    replay = captured(run)
    assert torch.equal(replay()[real], eager[real])
    # The same graph for other tokens, of which others are padding.
    other = ExpertCase(case.shape, DEVICE, padding=tokens // 3, stacks=layer.stacks)
    case.hidden.copy_(other.hidden)
    case.batch.cache_slots.copy_(other.batch.cache_slots)
    case.batch.token_ids.copy_(other.batch.token_ids)
    result, real = replay(), case.real
    expected = case.expected_of(router)
    assert float((result[real].double() - expected[real].double()).norm() / expected[real].double().norm()) < TOLERANCE
    assert not kernels_counters().any()


@pytest.fixture
def grouped_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of more than few tokens take Hopper's grouped products, or nothing."""
    if not runs_gluon(DEVICE):
        pytest.skip("needs Hopper and the Triton that its kernels are for")
    monkeypatch.setattr("engines.kernels.cuda.grouped.FEWEST_TOKENS", 0)
    monkeypatch.delattr("engines.kernels.cuda.mixture.group_pairs")


@pytest.mark.parametrize(("tokens", "uniform"), [(257, 7), (300, None), (1000, 7), (3001, None), (8192, 7)])
def test_grouped_products(tokens: int, uniform: int | None, layer: ExpertCase, grouped_products: None) -> None:
    test_mixture(tokens, uniform, layer)


@pytest.mark.parametrize("tokens", [1, 64, 65, 128, 129, 2000])
def test_grouped_products_of_one_choice(tokens: int, layer: ExpertCase, grouped_products: None) -> None:
    case = ExpertCase(Shape(tokens, 2048, 1408, 64, 6, 2), DEVICE, padding=tokens // 3, stacks=layer.stacks)
    weights, real = torch.rand(tokens, 6, device=DEVICE), case.real
    experts = torch.tensor([63, 1, 2, 7, 30, 0], device=DEVICE).expand(tokens, -1)
    slots = case.batch.cache_slots
    result = sorted_mixture(case.hidden, case.normed(), weights, experts, case.stacks, slots)
    every = torch.cat([experts, torch.tensor([[64, 65]], device=DEVICE).expand(tokens, -1)], dim=1)
    expected = case.expected(torch.cat([weights, torch.ones(tokens, 2, device=DEVICE)], dim=1), every)
    assert float((result[real].double() - expected[real].double()).norm() / expected[real].double().norm()) < TOLERANCE


def kernels_counters() -> torch.Tensor:
    from engines.kernels.cuda.scratch import counters

    scratch = counters(DEVICE)
    return torch.cat([scratch.counts, scratch.arrivals])


@pytest.mark.parametrize(
    "contexts",
    [
        [1],
        [600],
        [4000],
        [17, 1, 64],
        [600] * 5,
        [random.randrange(1, 4000) for _ in range(16)],
        [random.randrange(1, 900) for _ in range(33)],
        [300] * 130,
        [70] * 256,
    ],
)
@pytest.mark.parametrize(("padding", "fp8"), [(0, False), (3, False), (3, True)])
def test_latent_decodes(contexts: list[int], padding: int, fp8: bool) -> None:
    case = LatentCase(contexts, V2_LITE, DEVICE, padding, fp8=fp8)

    def run() -> torch.Tensor:
        return kernels.latent_attention(
            case.queries.view(case.queries.shape[0], -1), case.latents, case.shape, case.caches, case.batch
        )

    eager = run()
    assert case.distance(eager) < (FP8_TOLERANCE if fp8 else TOLERANCE)
    assert case.cache_is_written()
    replay = captured(run)
    assert torch.equal(replay()[: case.tokens], eager[: case.tokens])


@pytest.mark.parametrize(
    ("contexts", "counts"),
    [
        ([2048], [2048]),
        ([600, 33, 1, 900, 300, 17, 128, 129], [1, 1, 1, 900, 100, 2, 128, 1]),
        ([5000, 700], [300, 700]),
        ([random.randrange(1, 400) for _ in range(40)] + [90] * 50, [1] * 40 + [60] * 50),
    ],
)
@pytest.mark.parametrize("fp8", [False, True])
def test_latent_prompts(contexts: list[int], counts: list[int], fp8: bool) -> None:
    contexts, counts, tolerance = contexts[:], counts[:], FP8_TOLERANCE if fp8 else TOLERANCE
    order = sorted(range(len(counts)), key=lambda row: counts[row] > 1)
    case = LatentCase([contexts[row] for row in order], V2_LITE, DEVICE, counts=[counts[row] for row in order], fp8=fp8)
    flat = case.queries.flatten(1)
    result = kernels.latent_attention(flat.clone(), case.latents, case.shape, case.caches, case.batch)
    assert case.distance(result) < tolerance
    assert case.cache_is_written()
    # The form that needs no count of blocks.
    unknown = dataclasses.replace(case.batch, decode_rows=0, prompt_blocks=1 << 20)
    absorbed = kernels.latent_attention(flat, case.latents.clone(), case.shape, case.caches, unknown)
    assert case.distance(absorbed) < tolerance


@pytest.mark.parametrize("widths", [Widths(5, 64, 96, 128, 32, False), Widths(40, 128, 128, 512, 64, True)])
def test_other_widths(widths: Widths) -> None:
    case = LatentCase([130, 2, 700], widths, DEVICE)
    result = kernels.latent_attention(case.queries.flatten(1), case.latents, case.shape, case.caches, case.batch)
    assert case.distance(result) < TOLERANCE
    assert case.cache_is_written()
