"""Mixtures of experts in float32 against their definition, in the layout of each device."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional

from engines import kernels
from engines.kernels import PackedExperts, RmsNorm, Router, RoutingRule
from engines.kernels.experts import Stacks, choose, cut_shared
from engines.models.batch import Batch

TOKENS, WIDTH, INNER, SHARED, EXPERTS, CHOSEN = 13, 48, 24, 40, 8, 3


@pytest.fixture
def batch() -> Batch:
    number = torch.arange(TOKENS)
    return Batch(number, number * 7, number, number.int(), number.int(), number.int(), None, 1, 1)


def random(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes).mul_(sizes[-1] ** -0.5)


class Layer:
    def __init__(self, rule: RoutingRule, correction: bool = False) -> None:
        self.gate_up = [random(2 * INNER, WIDTH) for _ in range(EXPERTS)]
        self.down = [random(WIDTH, INNER) for _ in range(EXPERTS)]
        self.shared = random(2 * SHARED, WIDTH), random(WIDTH, SHARED)
        self.norm = RmsNorm(torch.rand(WIDTH) + 0.5, 1e-5)
        correct = torch.rand(EXPERTS) if correction else None
        self.router = Router(kernels.pack_dense(random(EXPERTS, WIDTH)), correct, rule)

    def stacked(self) -> PackedExperts:
        """As on a GPU."""
        gate_up, down = cut_shared(*self.shared, inner=INNER)
        stacks = Stacks(torch.stack(self.gate_up + gate_up), torch.stack(self.down + down), CHOSEN, len(down))
        return PackedExperts((), (), None, stacks)

    def expected(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        x = self.norm(hidden)
        weights, experts = choose(x, self.router, batch)
        total = hidden + gated(x, *self.shared)
        for token in range(TOKENS):
            for weight, expert in zip(weights[token], experts[token].tolist(), strict=True):
                total[token] += weight * gated(x[token], self.gate_up[expert], self.down[expert])
        return total


def gated(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (functional.silu(gate) * up) @ down.T


RULES = [
    (RoutingRule(CHOSEN, normalise=True), False),
    (RoutingRule(CHOSEN, uniform_layer=4), False),
    (RoutingRule(CHOSEN, "sigmoid", groups=4, top_groups=2, normalise=True, scale=2.5), True),
]


@pytest.mark.parametrize(("rule", "correction"), RULES)
def test_mixture(rule: RoutingRule, correction: bool, batch: Batch) -> None:
    layer, hidden = Layer(rule, correction), torch.randn(TOKENS, WIDTH)
    expected = layer.expected(hidden, batch)
    gate_up = [weight.chunk(2) for weight in layer.gate_up]
    packed = kernels.pack_experts(gate_up, layer.down, (layer.shared[0].chunk(2), layer.shared[1]), CHOSEN)
    torch.testing.assert_close(kernels.mixture(hidden, layer.norm, layer.router, packed, batch), expected)
    torch.testing.assert_close(kernels.mixture(hidden, layer.norm, layer.router, layer.stacked(), batch), expected)


def test_a_token_takes_as_many_different_experts_by_chance(batch: Batch) -> None:
    x = torch.randn(TOKENS, WIDTH)
    draws = []
    for layer in (0, 1):
        router = Layer(RoutingRule(CHOSEN, uniform_layer=layer)).router
        _, experts = choose(x, router, batch)
        assert (experts.sort(dim=1).values.diff(dim=1) > 0).all()
        draws.append(experts)
        moved = dataclasses.replace(batch, positions=batch.positions + 1)
        assert not torch.equal(choose(x, router, moved)[1], experts)
    assert not torch.equal(*draws)
