"""Pairs of tokens and experts in the order of the experts, for steps of many tokens: a counting sort in two launches.

Inside an expert pairs keep the order of their tokens, so the result is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engines.kernels.cuda.experts import Grouping
from engines.kernels.cuda.launch import Launcher

TILE_TOKENS = 64
"""With twice as many a thread has more counts than registers."""


@triton.jit
def _takes(experts, token, tokens, C: tl.constexpr, EXPERTS_BLOCK: tl.constexpr):
    """(tokens, EXPERTS_BLOCK) int32: 1 where the token takes the expert."""
    expert = tl.arange(0, EXPERTS_BLOCK)[None, :]
    takes = tl.zeros((token.shape[0], EXPERTS_BLOCK), tl.int32)
    for column in tl.static_range(C):
        number = tl.load(experts + token * C + column, mask=token < tokens, other=-1)
        takes += (number[:, None] == expert).to(tl.int32)
    return takes


@triton.jit(do_not_specialize=["tokens"])
def _count_kernel(
    experts,
    tile_counts,
    tokens,
    C: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    TILE_T: tl.constexpr,
    PAIRS_BLOCK: tl.constexpr,
):
    """Grid (tiles of tokens,)."""
    tile = tl.program_id(0)
    place = tl.arange(0, PAIRS_BLOCK)
    pair = tile * (TILE_T * C) + place
    number = tl.load(experts + pair, mask=(place < TILE_T * C) & (pair < tokens * C), other=-1)
    found = tl.histogram(tl.maximum(number, 0), EXPERTS_BLOCK, mask=number >= 0)
    tl.store(tile_counts + tile * EXPERTS_BLOCK + tl.arange(0, EXPERTS_BLOCK), found)


@triton.jit(do_not_specialize=["tokens"])
def _place_kernel(
    experts,
    tile_counts,
    counts,
    pairs,
    tokens,
    C: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    TILE_T: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    SLOT: tl.constexpr,
):
    """Grid (tiles of tokens,). ``pairs`` by expert; or with SLOT above 1 the place of each where every expert begins at
    a multiple of that."""
    own = tl.program_id(0)
    expert = tl.arange(0, EXPERTS_BLOCK)
    tiles = tl.cdiv(tokens, TILE_T)
    total = tl.zeros((EXPERTS_BLOCK,), tl.int32)
    before = tl.zeros((EXPERTS_BLOCK,), tl.int32)
    for first in range(0, tiles, TILES_BLOCK):
        tile = first + tl.arange(0, TILES_BLOCK)
        found = tl.load(
            tile_counts + tile[:, None] * EXPERTS_BLOCK + expert[None, :], mask=(tile < tiles)[:, None], other=0
        )
        total += tl.sum(found, 0)
        before += tl.sum(tl.where((tile < own)[:, None], found, 0), 0)
    if own == 0:
        tl.store(counts + expert, total, mask=expert < EXPERTS)
    filled = (total + SLOT - 1) // SLOT * SLOT
    starts = tl.cumsum(filled, 0) - filled + before
    token = own * TILE_T + tl.arange(0, TILE_T)
    takes = _takes(experts, token, tokens, C, EXPERTS_BLOCK)
    places = tl.cumsum(takes, 0) - takes + starts[None, :]
    for column in tl.static_range(C):
        number = tl.load(experts + token * C + column, mask=token < tokens, other=-1)
        place = tl.sum(tl.where(number[:, None] == expert[None, :], places, 0), 1)
        if SLOT > 1:
            tl.store(pairs + token * C + column, place, mask=number >= 0)
        else:
            tl.store(pairs + place, token * C + column, mask=number >= 0)


_count = Launcher(_count_kernel)
_place = Launcher(_place_kernel)


def group_pairs(experts: torch.Tensor, number: int) -> Grouping:
    """(T, C) int32 choice among ``number`` experts, -1 none -> the pairs by expert."""
    return Grouping(*_sorted(experts, number, slot=1))


def place_pairs(experts: torch.Tensor, number: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, C) int32 choice among ``number`` experts, -1 none -> (number,) int32 counts, and (T * C,) int32: the place of
    each pair where the pairs stand by expert and each expert begins at a multiple of ``slot``, 2 or more."""
    return _sorted(experts, number, slot)


def _sorted(experts: torch.Tensor, number: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, columns = experts.shape
    block = max(16, triton.next_power_of_2(number))
    tiles = triton.cdiv(tokens, TILE_TOKENS)
    tile_counts = torch.empty((tiles, block), dtype=torch.int32, device=experts.device)
    counts = torch.empty(number, dtype=torch.int32, device=experts.device)
    pairs = torch.empty(tokens * columns, dtype=torch.int32, device=experts.device)
    pairs_block = triton.next_power_of_2(TILE_TOKENS * columns)
    _count((tiles, 1, 1), (experts, tile_counts), (), (tokens,), (columns, block, TILE_TOKENS, pairs_block))
    _place(
        (tiles, 1, 1),
        (experts, tile_counts, counts, pairs),
        (),
        (tokens,),
        (columns, number, block, TILE_TOKENS, 32, slot),
    )
    return counts, pairs
