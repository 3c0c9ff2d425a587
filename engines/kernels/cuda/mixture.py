"""A whole expert layer on a GPU: routing, the products cut for the number of tokens, and the sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engines.kernels.cuda.device import starts_early
from engines.kernels.cuda.expert_tuning import MOST_FEW, Tiles, tiles_for
from engines.kernels.cuda.experts import Grouping, combine, expert_products
from engines.kernels.cuda.experts_one import one_token
from engines.kernels.cuda.grouped import grouped_mixture
from engines.kernels.cuda.grouping import group_pairs
from engines.kernels.cuda.routing import Routed, choose_experts
from engines.kernels.cuda.scratch import counters

if TYPE_CHECKING:
    from engines.kernels.experts import RoutedBatch, Router, Stacks

MOST_ALONE = 1
"""Tokens whose experts need no counts: one, or none for the form of few tokens in every step."""


def mixture(
    hidden: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    router: Router,
    stacks: Stacks,
    batch: RoutedBatch,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """(T, width) bfloat16 stream in and out; ``gain`` and ``eps`` are the norm's. ``tiles`` None: as tables say."""
    tokens = hidden.shape[0]
    few, alone = tokens <= MOST_FEW, tokens <= MOST_ALONE
    early = few and starts_early(hidden.device)
    scratch = counters(hidden.device)
    count = few and not alone
    routed = choose_experts(hidden, gain, eps, router, stacks.shared, batch, scratch, count=count, early=early)
    if not few:
        return _sorted(hidden, routed, stacks, tiles)
    tiles = tiles or _tiles(hidden, stacks)
    if alone:
        return one_token(hidden, routed, stacks, tiles, early)
    products = expert_products(routed, stacks, Grouping(scratch.counts, None), tiles, early)
    return combine(hidden, products, routed, stacks.gate_up.shape[0], reset=scratch.counts, early=early)


def sorted_mixture(
    hidden: torch.Tensor,
    normed: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    stacks: Stacks,
    cache_slots: torch.Tensor,
) -> torch.Tensor:
    """As ``mixture``, with the choice already made: (T, k) weights, float32, and experts, int64."""
    tokens = hidden.shape[0]
    first = stacks.gate_up.shape[0] - stacks.shared
    numbers = torch.arange(first, first + stacks.shared, device=hidden.device)
    every = torch.cat([experts, numbers.expand(tokens, -1)], dim=1).int()
    every = every.masked_fill(cache_slots.unsqueeze(1) < 0, -1)
    ones = weights.new_ones(tokens, stacks.shared)
    return _sorted(hidden, Routed(normed, torch.cat([weights, ones], dim=1), every), stacks)


def _sorted(hidden: torch.Tensor, routed: Routed, stacks: Stacks, tiles: Tiles | None = None) -> torch.Tensor:
    if tiles is None and (result := grouped_mixture(hidden, routed, stacks)) is not None:
        return result
    tiles = tiles or _tiles(hidden, stacks)
    grouping = group_pairs(routed.experts, stacks.gate_up.shape[0])
    products = expert_products(routed, stacks, grouping, tiles, early=False)
    return combine(hidden, products, routed, stacks.gate_up.shape[0], reset=None, early=False)


def _tiles(hidden: torch.Tensor, stacks: Stacks) -> Tiles:
    (experts, width, inner), tokens = stacks.down.shape, hidden.shape[0]
    return tiles_for(tokens, width, inner, experts, hidden.device)
