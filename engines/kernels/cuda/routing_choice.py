"""What all forms of routing do for a token: its norm, its draw of experts, its choice."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from engines.kernels.cuda.launch import Launcher


@dataclass(frozen=True, slots=True)
class Division:
    """Which kernel routes a step, and how its programs share the work."""

    launch: Launcher
    grid: tuple[int, int, int]
    partial_floats: int
    """Of scratch: what programs leave for the one that chooses."""
    free: tuple[int, ...]
    """The kernel's own parameters before those that both kernels have."""
    constants: tuple[int, ...]
    """Likewise, between the sizes and the flags that both have."""


@triton.jit
def uniform_scores(positions, token_ids, tokens, present, layer, EXPERTS: tl.constexpr):
    """(tokens, EXPERTS) float32: 24 random bits for each pair, from Philox at (expert // 4, position, token id)."""
    position = tl.load(positions + tokens, mask=present, other=0).to(tl.uint32)
    token_id = tl.load(token_ids + tokens, mask=present, other=0).to(tl.uint32)
    group = tl.arange(0, EXPERTS // 4).to(tl.uint32)[None, :]
    zero = tl.zeros_like(position)[:, None] + tl.zeros_like(group)
    w0, w1, w2, w3 = tl.philox_impl(
        zero + group,
        zero + position[:, None],
        zero + token_id[:, None],
        zero,
        zero + layer.to(tl.uint32),
        zero,
    )
    return (tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)) >> 8).to(tl.int32).to(tl.float32)


@triton.jit
def ranks_among(values, number, EXPERTS: tl.constexpr, CHOSEN: tl.constexpr):
    """The place of the CHOSEN largest of each row, none of which is negative, in descending order; CHOSEN of others.

    At a tie the lower number comes first.
    """
    # Floats that are not negative have the order of their bits; one maximum then finds value and number.
    key = (values.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (EXPERTS - number).to(tl.int64)[None, :]
    key = tl.where((number < EXPERTS)[None, :], key, -1)
    rank = tl.zeros_like(key).to(tl.int32) + CHOSEN
    for place in tl.static_range(CHOSEN):
        best = key == tl.max(key, 1)[:, None]
        rank = tl.where(best, place, rank)
        key = tl.where(best, -1, key)
    return rank


@triton.jit
def token_scores(logits, squares, eps, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr):
    """(tokens, EXPERTS_BLOCK) softmax of the logits of a stream whose squares' sums are known; 0 behind the experts."""
    is_expert = (tl.arange(0, EXPERTS_BLOCK) < EXPERTS)[None, :]
    logits = tl.where(is_expert, logits * tl.rsqrt(squares / WIDTH + eps)[:, None], float("-inf"))
    scores = tl.exp(logits - tl.max(logits, 1)[:, None])
    scores = scores / tl.sum(scores, 1)[:, None]
    # A stream that is not finite still takes experts that differ.
    return tl.where(scores == scores, scores, 0.0)


@triton.jit
def store_choice(
    scores,
    rank,
    token,
    present,
    valid,
    scale,
    weights,
    experts,
    counts,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
    SHARED: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORMALISE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Each token's experts of a rank below CHOSEN, with their scores as weights, and after them the shared ones."""
    expert = tl.arange(0, EXPERTS_BLOCK)
    taken = rank < CHOSEN
    total = tl.sum(tl.where(taken, scores, 0.0), 1)[:, None] + 1e-20 if NORMALISE else 1.0
    first = token.to(tl.int64)[:, None] * (CHOSEN + SHARED)
    numbers = tl.zeros_like(rank) + expert[None, :]
    tl.store(weights + first + rank, scores * scale / total, mask=taken & present[:, None])
    tl.store(experts + first + rank, tl.where(valid[:, None], numbers, -1), mask=taken & present[:, None])
    if COUNT:
        tl.atomic_add(counts + numbers, tl.zeros_like(rank) + 1, mask=taken & valid[:, None], sem="relaxed")
    if SHARED > 0:
        column = tl.arange(0, COLUMNS)[None, :]
        zeros = tl.zeros((token.shape[0], COLUMNS), tl.int32)
        always = EXPERTS + column + zeros
        is_shared = present[:, None] & (column < SHARED)
        tl.store(weights + first + CHOSEN + column, zeros.to(tl.float32) + 1.0, mask=is_shared)
        tl.store(experts + first + CHOSEN + column, tl.where(valid[:, None], always, -1), mask=is_shared)
        if COUNT:
            tl.atomic_add(counts + always, zeros + 1, mask=is_shared & valid[:, None], sem="relaxed")


@triton.jit
def norm_one(hidden, gain, normed, token, hidden_stride, eps, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr):
    dims = tl.arange(0, WIDTH_BLOCK)
    x = tl.load(hidden + token * hidden_stride + dims, mask=dims < WIDTH, other=0.0).to(tl.float32)
    factor = tl.load(gain + dims, mask=dims < WIDTH, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    tl.store(normed + token * WIDTH + dims, (x * scale * factor).to(normed.dtype.element_ty), mask=dims < WIDTH)
