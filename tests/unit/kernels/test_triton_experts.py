"""The expert kernels against their definition, through Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from engines.kernels.cuda.expert_tuning import Tile, Tiles
from engines.kernels.cuda.scratch import counters
from tests.expert_cases import EPS, ExpertCase, Shape

DEVICE = pytest.importorskip("tests.triton_interpreter", reason="needs Triton").DEVICE
mixture = pytest.importorskip("engines.kernels.cuda.mixture")
choose_experts = pytest.importorskip("engines.kernels.cuda.routing").choose_experts
group_pairs = pytest.importorskip("engines.kernels.cuda.grouping").group_pairs
TOLERANCE = 2e-2
"""Triton's interpreter cuts off what does not fit into bfloat16."""
SHAPES = [
    (Shape(1, 128, 48, 16, 3, 2), 0),
    (Shape(1, 144, 40, 20, 6, 1), 0),
    (Shape(1, 128, 48, 16, 4, 0), 1),
    (Shape(3, 600, 16, 20, 4, 0), 1),
    (Shape(5, 160, 40, 16, 6, 2), 2),
    (Shape(37, 96, 64, 20, 4, 0), 1),
    (Shape(40, 96, 48, 16, 4, 1), 40),
    (Shape(257, 32, 16, 16, 2, 1), 7),
]


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("shape", "padding"), SHAPES)
@pytest.mark.parametrize("uniform", [None, 3])
@pytest.mark.parametrize("normalise", [False, True])
def test_routing(shape: Shape, padding: int, uniform: int | None, normalise: bool) -> None:
    case = ExpertCase(shape, DEVICE, padding)
    router = case.with_rule(uniform_layer=uniform, normalise=normalise, scale=1.0 if normalise else 2.5)
    scratch = counters(DEVICE)
    routed = choose_experts(case.hidden, case.gain, EPS, router, shape.shared, case.batch, scratch, True, False)
    real = case.real
    scores, ranks = (values[real] for values in case.scores(router))
    chosen = routed.experts[real, : shape.chosen].long()
    assert torch.equal(
        routed.experts[case.padding].unique(), torch.full_like(routed.experts[case.padding].unique(), -1)
    )
    assert (chosen.sort(dim=1).values.diff(dim=1) > 0).all()
    # Best first; what is near a tie may be taken in either order.
    expected = ranks.sort(dim=1, descending=True).values[:, : shape.chosen]
    torch.testing.assert_close(ranks.gather(1, chosen), expected, rtol=2e-2, atol=0 if uniform else 1e-3)
    taken = scores.gather(1, chosen)
    wanted = taken / taken.sum(dim=1, keepdim=True) if normalise else taken * 2.5
    torch.testing.assert_close(routed.weights[real, : shape.chosen].double(), wanted, rtol=5e-2, atol=2e-3)
    assert (routed.weights[real, shape.chosen :] == 1).all()
    every = torch.arange(shape.experts, shape.experts + shape.shared, device=DEVICE)
    assert torch.equal(routed.experts[real, shape.chosen :].long(), every.expand(real.shape[0], -1))
    numbers = routed.experts[real].flatten().long()
    total = shape.experts + shape.shared
    assert torch.equal(scratch.counts[:total].long(), torch.bincount(numbers, minlength=total))
    scratch.counts.zero_()
    assert not scratch.arrivals.any()
    torch.testing.assert_close(routed.normed[real], case.normed()[real], rtol=2e-2, atol=1e-3)


def test_uniform_routing_is_uniform_and_fresh() -> None:
    shape = Shape(2000, 32, 16, 16, 4, 0)
    case = ExpertCase(shape, DEVICE)
    case.batch.positions.copy_(torch.arange(2000))
    draws = []
    for layer in (1, 2):
        router = case.with_rule(uniform_layer=layer)
        scratch = counters(DEVICE)
        routed = choose_experts(case.hidden, case.gain, EPS, router, 0, case.batch, scratch, False, False)
        draws.append(routed.experts)
        counts = torch.bincount(routed.experts.flatten().long(), minlength=16)
        # 500 expected with a deviation of 19.
        assert int((counts - 500).abs().max()) < 120
    assert float((draws[0] == draws[1]).float().mean()) < 0.15


@pytest.mark.parametrize(("shape", "padding"), SHAPES)
@pytest.mark.parametrize("tile", [None, Tile(16, 32, 32, 4, 3), Tile(64, 64, 64, 4, 3)])
def test_mixture(shape: Shape, padding: int, tile: Tile | None) -> None:
    case = ExpertCase(shape, DEVICE, padding)
    tiles = None if tile is None else Tiles(tile, tile)
    result = mixture.mixture(case.hidden, case.gain, EPS, case.router, case.stacks, case.batch, tiles)
    real = case.real
    if real.numel():
        assert distance(result[real], case.expected_of(case.router)[real]) < TOLERANCE
    assert not counters(DEVICE).counts.any()
    again = mixture.mixture(case.hidden, case.gain, EPS, case.router, case.stacks, case.batch, tiles)
    assert torch.equal(result[real], again[real])


def test_one_token_as_many_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ExpertCase(Shape(1, 160, 72, 16, 5, 1), DEVICE)
    alone = mixture.mixture(case.hidden, case.gain, EPS, case.router, case.stacks, case.batch)
    monkeypatch.setattr(mixture, "MOST_ALONE", 0)
    among = mixture.mixture(case.hidden, case.gain, EPS, case.router, case.stacks, case.batch)
    assert distance(alone, among) < TOLERANCE
    assert not counters(DEVICE).counts.any()


def test_a_choice_made_elsewhere() -> None:
    shape = Shape(30, 96, 48, 16, 4, 1)
    case = ExpertCase(shape, DEVICE, padding=3)
    scores, _ = case.scores(case.router)
    weights, experts = scores.nan_to_num().topk(4, dim=1)
    result = mixture.sorted_mixture(
        case.hidden, case.normed(), weights.float(), experts, case.stacks, case.batch.cache_slots
    )
    shared = torch.full((30, 1), 16, device=DEVICE)
    every = torch.cat([experts, shared], dim=1)
    ones = torch.ones(30, 1, device=DEVICE)
    expected = case.expected(torch.cat([weights.float(), ones], dim=1), every)
    assert distance(result[case.real], expected[case.real]) < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 64, 150])
def test_pairs_are_sorted_by_expert(tokens: int) -> None:
    experts = torch.rand(tokens, 14, device=DEVICE).topk(5, dim=1).indices.int()
    experts[torch.rand(tokens, device=DEVICE) < 0.1] = -1
    grouping = group_pairs(experts, 14)
    numbers, order = experts.flatten().sort(stable=True)
    expected = order[numbers >= 0].int()
    assert grouping.pairs is not None
    assert torch.equal(grouping.pairs[: expected.shape[0]], expected)
    assert torch.equal(grouping.counts.long(), torch.bincount(numbers[numbers >= 0].long(), minlength=14))
