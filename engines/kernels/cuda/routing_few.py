"""Routing of few tokens: each has programs of its own, which have read their part of the router before it is there.

All is float32: with one token a program there is nothing that matrix units could share.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from engines.kernels.cuda.launch import Launcher
from engines.kernels.cuda.routing_choice import Division, norm_one, store_choice, token_scores, uniform_scores

MOST_TOKENS, MOST_EXPERTS, MOST_SPLITS = 16, 128, 32
WEIGHTS = 8192
"""Of the router in one program's registers."""


@triton.jit
def _ranks(values, EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr):
    """(1, EXPERTS_BLOCK): how many are larger than each of one token's values, none of which is negative.

    At a tie the lower number comes first.
    """
    number = tl.arange(0, EXPERTS_BLOCK)
    key = tl.reshape(values.to(tl.int32, bitcast=True).to(tl.int64), (EXPERTS_BLOCK,)) << 32
    key = tl.where(number < EXPERTS, key | (EXPERTS - number).to(tl.int64), -1 - number.to(tl.int64))
    larger = key[:, None] > key[None, :]
    return tl.sum(larger.to(tl.int32), 0)[None, :]


@triton.jit(do_not_specialize=["layer"])
def _route_few_kernel(
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
    SPLITS_BLOCK: tl.constexpr,
    TILE_K: tl.constexpr,
    UNIFORM: tl.constexpr,
    NORMALISE: tl.constexpr,
    COUNT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (tokens, SPLITS + 1): shares of a token's logits, of which the last to arrive chooses, and its norm.

    With COUNT each expert's tokens are added to ``counts``.
    """
    if EARLY:
        tl_cuda.gdc_launch_dependents()
    number, split = tl.program_id(0), tl.program_id(1)
    if split == SPLITS:
        if EARLY:
            tl_cuda.gdc_wait()
        norm_one(hidden, gain, normed, number.to(tl.int64), hidden_stride, eps, WIDTH, WIDTH_BLOCK)
        return
    expert = tl.arange(0, EXPERTS_BLOCK)
    dims = split * TILE_K + tl.arange(0, TILE_K)
    mask = (expert < EXPERTS)[:, None] & (dims < WIDTH)[None, :]
    lines = tl.load(router + expert[:, None] * WIDTH + dims[None, :], mask=mask, other=0.0)
    factor = tl.load(gain + dims, mask=dims < WIDTH, other=0.0).to(tl.float32)
    if EARLY:
        tl_cuda.gdc_wait()
    # What fills the step up may hold anything, NaN too: it is never loaded.
    valid = tl.load(cache_slots + number) >= 0
    source = hidden + number.to(tl.int64) * hidden_stride
    x = tl.load(source + dims, mask=(dims < WIDTH) & valid, other=0.0).to(tl.float32)
    own = partials + number * (SPLITS * (EXPERTS_BLOCK + 1))
    squares = own + SPLITS * EXPERTS_BLOCK
    tl.store(own + split * EXPERTS_BLOCK + expert, tl.sum(lines * (x * factor)[None, :], 1))
    tl.store(squares + split, tl.sum(x * x, 0))
    # All threads have stored before one of them counts; the count orders the stores before the last one's loads.
    tl.debug_barrier()
    if tl.atomic_add(arrivals + number, 1, sem="acq_rel") < SPLITS - 1:
        return
    tl.store(arrivals + number, 0)
    other = tl.arange(0, SPLITS_BLOCK)
    is_other = other < SPLITS
    place = own + other[:, None] * EXPERTS_BLOCK + expert[None, :]
    logits = tl.sum(tl.load(place, mask=is_other[:, None], other=0.0, cache_modifier=".cg"), 0)
    square = tl.sum(tl.load(squares + other, mask=is_other, other=0.0, cache_modifier=".cg"), 0)

    token = number + tl.arange(0, 1)
    present = token >= 0
    scores = token_scores(logits[None, :], square + tl.zeros((1,), tl.float32), eps, WIDTH, EXPERTS, EXPERTS_BLOCK)
    ranked = uniform_scores(positions, token_ids, token, present, layer, EXPERTS_BLOCK) if UNIFORM else scores
    store_choice(
        scores,
        _ranks(ranked, EXPERTS, EXPERTS_BLOCK),
        token,
        present,
        tl.load(cache_slots + token) >= 0,
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


_route_few = Launcher(_route_few_kernel)


def divide_few(tokens: int, width: int, experts: int) -> Division | None:
    """Programs for each token; None where they would be too many, or too large."""
    block = triton.next_power_of_2(experts)
    depth = WEIGHTS // block
    splits = triton.cdiv(width, depth)
    if tokens > MOST_TOKENS or experts > MOST_EXPERTS or splits > MOST_SPLITS:
        return None
    constants = (splits, triton.next_power_of_2(splits), depth)
    return Division(_route_few, (tokens, splits + 1, 1), tokens * splits * (block + 1), (), constants)
