"""Which experts a token takes: norm, router product, softmax and choice in one launch, or of many tokens in two.

The product is as exact as one in float32, though it runs on the matrix units: the activations are bfloat16, and each
float32 weight is the sum of three bfloat16 numbers. Where the tokens are few, several programs share a tile of them
along the width, and the last one to arrive chooses. Programs that norm one token each have as many registers as those
that multiply, so that few run at once: where the tokens are many their norm is a launch of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from engines.kernels.cuda.elementwise import rms_norm
from engines.kernels.cuda.expert_tuning import MOST_FEW
from engines.kernels.cuda.launch import Launcher
from engines.kernels.cuda.routing_choice import (
    Division,
    norm_one,
    ranks_among,
    store_choice,
    token_scores,
    uniform_scores,
)
from engines.kernels.cuda.routing_few import divide_few
from engines.kernels.cuda.scratch import Counters

if TYPE_CHECKING:
    from engines.kernels.experts import RoutedBatch, Router


@dataclass(frozen=True, slots=True)
class _Tile:
    tokens: int
    depth: int
    programs: int
    """So many share the work, about."""
    splits: int
    """Most programs that share one tile: each number of them is compiled apart."""


FEW, SOME, MANY = _Tile(16, 128, 128, 16), _Tile(32, 64, 1024, 8), _Tile(64, 64, 256, 4)
MOST_SOME = 1024
"""Tokens."""


@triton.jit(do_not_specialize=["tokens", "layer"])
def _route_kernel(
    hidden,
    gain,
    router,
    positions,
    token_ids,
    cache_slots,
    normed,
    weights,
    experts,
    counts,
    partials,
    arrivals,
    hidden_stride,
    tokens,
    layer,
    eps,
    scale,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    SHARED: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_K: tl.constexpr,
    UNIFORM: tl.constexpr,
    NORMALISE: tl.constexpr,
    COUNT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (tiles of tokens, SPLITS or SPLITS + TILE_T): shares of the logits of a tile, then the norm of its tokens.

    With COUNT each expert's tokens are added to ``counts``.
    """
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    tile, split = tl.program_id(0), tl.program_id(1)
    if split >= SPLITS:
        alone = tile * TILE_T + split - SPLITS
        if alone < tokens:
            norm_one(hidden, gain, normed, alone.to(tl.int64), hidden_stride, eps, WIDTH, WIDTH_BLOCK)
        return
    token = tile * TILE_T + tl.arange(0, TILE_T)
    present = token < tokens
    # What fills the step up may hold anything, NaN too: it is never loaded.
    valid = tl.load(cache_slots + token, mask=present, other=-1) >= 0
    wide_token = token.to(tl.int64)
    source = hidden + wide_token[:, None] * hidden_stride

    # Programs of one tile share its width, in whole blocks.
    share: tl.constexpr = ((WIDTH + TILE_K - 1) // TILE_K + SPLITS - 1) // SPLITS * TILE_K
    expert = tl.arange(0, EXPERTS_BLOCK)
    logits = tl.zeros((TILE_T, EXPERTS_BLOCK), tl.float32)
    squares = tl.zeros((TILE_T,), tl.float32)
    for block in range(0, share, TILE_K):
        dims = split * share + block + tl.arange(0, TILE_K)
        inside = (dims < WIDTH)[None, :]
        x = tl.load(source + dims[None, :], mask=valid[:, None] & inside, other=0.0)
        factor = tl.load(gain + dims, mask=dims < WIDTH, other=0.0).to(tl.float32)
        mask = (expert < EXPERTS)[:, None] & inside
        rest = tl.load(router + expert[:, None] * WIDTH + dims[None, :], mask=mask, other=0.0) * factor[None, :]
        squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        for _ in tl.static_range(3):
            part = rest.to(tl.bfloat16)
            logits = tl.dot(x, tl.trans(part), logits)
            rest = rest - part.to(tl.float32)

    if SPLITS > 1:
        row = tile * TILE_T + tl.arange(0, TILE_T)
        place = row[:, None] * EXPERTS_BLOCK + expert[None, :]
        stride = tl.num_programs(0) * TILE_T
        sums = partials + SPLITS * stride * EXPERTS_BLOCK
        tl.store(partials + split * stride * EXPERTS_BLOCK + place, logits)
        tl.store(sums + split * stride + row, squares)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + tile, 1, sem="acq_rel")
        if arrived < SPLITS - 1:
            return
        tl.store(arrivals + tile, 0)
        logits = tl.zeros((TILE_T, EXPERTS_BLOCK), tl.float32)
        squares = tl.zeros((TILE_T,), tl.float32)
        for other in tl.static_range(SPLITS):
            logits += tl.load(partials + other * stride * EXPERTS_BLOCK + place, cache_modifier=".cg")
            squares += tl.load(sums + other * stride + row, cache_modifier=".cg")

    scores = token_scores(logits, squares, eps, WIDTH, EXPERTS, EXPERTS_BLOCK)
    ranked = uniform_scores(positions, token_ids, token, present, layer, EXPERTS_BLOCK) if UNIFORM else scores
    store_choice(
        scores,
        ranks_among(ranked, expert, EXPERTS, CHOSEN),
        token,
        present,
        valid,
        scale,
        weights,
        experts,
        counts,
        EXPERTS,
        EXPERTS_BLOCK,
        CHOSEN,
        SHARED,
        COLUMNS,
        NORMALISE,
        COUNT,
    )


_route = Launcher(_route_kernel)


@dataclass(frozen=True, slots=True)
class Routed:
    """What a step's tokens take: C columns a token, the chosen experts and then the shared ones."""

    normed: torch.Tensor
    """(T, width): the norm of the stream."""
    weights: torch.Tensor
    """(T, C) float32."""
    experts: torch.Tensor
    """(T, C) int32, -1 for a token that only fills the step up."""


def _divide(tokens: int, width: int, experts: int) -> Division:
    """Tiles of tokens, of each of which a power of two of programs share the width."""
    few = tokens <= MOST_FEW
    tile = FEW if few else SOME if tokens <= MOST_SOME else MANY
    tiles, splits = triton.cdiv(tokens, tile.tokens), 1
    while tiles * splits * 2 <= tile.programs and splits * 2 <= min(tile.splits, width // tile.depth):
        splits *= 2
    scratch = splits * tiles * tile.tokens * (triton.next_power_of_2(experts) + 1) if splits > 1 else 0
    grid = (tiles, splits + tile.tokens if few else splits, 1)
    return Division(_route, grid, scratch, (tokens,), (splits, tile.tokens, tile.depth))


def choose_experts(
    hidden: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    router: Router,
    shared: int,
    batch: RoutedBatch,
    counters: Counters,
    count: bool,
    early: bool,
) -> Routed:
    """(T, width) bfloat16 stream -> the choice of its tokens; with ``count`` added up in ``counters.counts`` too."""
    (tokens, width), rule, device = hidden.shape, router.rule, hidden.device
    number, columns = router.weight.out_features, rule.experts_per_token + shared
    many = tokens > MOST_FEW
    routed = Routed(
        rms_norm(hidden, gain, eps) if many else torch.empty((tokens, width), dtype=hidden.dtype, device=device),
        torch.empty((tokens, columns), dtype=torch.float32, device=device),
        torch.empty((tokens, columns), dtype=torch.int32, device=device),
    )
    division = divide_few(tokens, width, number) or _divide(tokens, width, number)
    partials = routed.weights
    if division.partial_floats:
        partials = torch.empty(division.partial_floats, dtype=torch.float32, device=device)
    inputs = (hidden, gain, router.weight.weight, batch.positions, batch.token_ids, batch.cache_slots)
    outputs = (routed.normed, routed.weights, routed.experts, counters.counts, partials, counters.arrivals)
    block = triton.next_power_of_2
    sizes = (width, block(width), number, block(number), rule.experts_per_token, shared, block(max(shared, 1)))
    flags = (rule.uniform_layer is not None, rule.normalise, count, early)
    division.launch(
        division.grid,
        (*inputs, *outputs),
        fixed=(hidden.stride(0),),
        free=(*division.free, rule.uniform_layer or 0, eps, 1.0 if rule.normalise else rule.scale),
        constants=(*sizes, *division.constants, *flags),
        early=early,
    )
    return routed
