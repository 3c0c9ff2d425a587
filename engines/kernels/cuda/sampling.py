"""Noise and draws. A draw is one program a row that reads the logits a few times and keeps nothing between rows.

Truncation needs one threshold a row: the largest logit that still keeps enough. It is found two bits of a float at a
time, by the sums over all that is at or above each of three bounds. Sums are taken in one order, so a row's token does
not depend on its neighbours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engines.kernels.cuda.launch import Launcher

DRAW_WARPS = 32
SEARCH_BLOCK, BLOCK = 8192, 2048
"""Logits that a program looks at at once, to find a threshold and to draw."""
NOISE_BLOCK = 1024


@triton.jit
def _gumbel(start, seed, choice, position, BLOCK: tl.constexpr):
    """Noise of the tokens ``start .. start+BLOCK-1``, ``start`` a multiple of four, as ``reference.gumbel_noise``."""
    group = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros((BLOCK // 4,), tl.uint32)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        group,
        zero + (position & 0xFFFFFFFF).to(tl.uint32),
        zero + (choice & 0xFFFFFFFF).to(tl.uint32),
        zero,
        zero + low,
        zero + high,
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    uniform = ((words >> 8).to(tl.float64) + 0.5) * (1.0 / 16777216.0)
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _value(key):
    """The float of a uint32 key in the order of the floats, from -inf to inf."""
    number = tl.minimum(tl.maximum(key, 0x007FFFFF), 0xFF800000)
    bits = tl.where(number >= 0x80000000, number ^ 0x80000000, number ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _load(logits, start, vocab, BLOCK: tl.constexpr):
    token = start + tl.arange(0, BLOCK)
    return tl.load(logits + token, mask=token < vocab, other=float("-inf"))


@triton.jit
def _divided(value, temperature):
    """Rounded as the division of two floats, which Triton's own operator is not."""
    return tl.math.div_rn(value, temperature + tl.zeros_like(value))


@triton.jit
def _weight(logit, best, rate, BY_MASS: tl.constexpr):
    """What a token counts: its probability beside the best one's, or 1."""
    return tl.exp((logit - best) * rate) if BY_MASS else tl.full(logit.shape, 1.0, tl.float32)


@triton.jit
def _threshold(logits, vocab, rate, best, floor, wanted, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit at or above which there are ``wanted`` tokens (or that share of the mass) of all those at or
    above ``floor``; -inf where all of them are not enough. ``rate`` is one over the temperature."""
    target = wanted
    if BY_MASS:
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab, BLOCK):
            logit = _load(logits, start, vocab, BLOCK)
            sums += tl.where(logit >= floor, _weight(logit, best, rate, BY_MASS), 0.0)
        target = wanted * tl.sum(sums, 0)
    found = tl.zeros((), tl.uint32)
    unit = tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):
        low = tl.maximum(_value(found + unit), floor)
        middle = tl.maximum(_value(found + 2 * unit), floor)
        high = tl.maximum(_value(found + 3 * unit), floor)
        above_low = tl.zeros((BLOCK,), tl.float32)
        above_middle = tl.zeros((BLOCK,), tl.float32)
        above_high = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab, BLOCK):
            logit = _load(logits, start, vocab, BLOCK)
            weight = _weight(logit, best, rate, BY_MASS)
            above_low += tl.where(logit >= low, weight, 0.0)
            above_middle += tl.where(logit >= middle, weight, 0.0)
            above_high += tl.where(logit >= high, weight, 0.0)
        # The sums fall from one bound to the next, so as many bounds are low enough as have enough above them.
        found += unit * (tl.sum(above_low, 0) >= target).to(tl.uint32)
        found += unit * (tl.sum(above_middle, 0) >= target).to(tl.uint32)
        found += unit * (tl.sum(above_high, 0) >= target).to(tl.uint32)
        unit = unit >> 2
    return _value(found)


@triton.jit(do_not_specialize=["first"])
def _draw_kernel(
    logits,
    drawn,
    temperatures,
    top_ps,
    min_ps,
    top_ks,
    seeds,
    choices,
    positions,
    stride,
    vocab,
    first,
    SEARCH_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (rows,)."""
    row = first + tl.program_id(0)
    logits += row.to(tl.int64) * stride
    temperature = tl.load(temperatures + row)
    top_p, min_p, top_k = tl.load(top_ps + row), tl.load(min_ps + row), tl.load(top_ks + row)
    floor = tl.full((), float("-inf"), tl.float32)
    if (top_p < 1.0) | (min_p > 0.0) | (top_k > 0):
        highest = tl.full((SEARCH_BLOCK,), float("-inf"), tl.float32)
        for start in range(0, vocab, SEARCH_BLOCK):
            highest = tl.maximum(highest, _load(logits, start, vocab, SEARCH_BLOCK))
        best, rate = tl.max(highest, 0), 1.0 / temperature
        if min_p > 0.0:
            floor = _divided(best, temperature) + tl.log(min_p.to(tl.float64)).to(tl.float32)
        # Thresholds are found among the logits and compared once divided, so that what is equal then stays together.
        least = floor * temperature
        if top_k > 0:
            kept = _threshold(logits, vocab, rate, best, least, top_k.to(tl.float32), False, SEARCH_BLOCK)
            least = tl.maximum(least, kept)
            floor = tl.maximum(floor, _divided(kept, temperature))
        if top_p < 1.0:
            kept = _threshold(logits, vocab, rate, best, least, top_p, True, SEARCH_BLOCK)
            floor = tl.maximum(floor, _divided(kept, temperature))

    seed, choice, position = tl.load(seeds + row), tl.load(choices + row), tl.load(positions + row)
    scores = tl.full((BLOCK,), float("-inf"), tl.float32)
    tokens = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        scaled = _divided(_load(logits, start, vocab, BLOCK), temperature)
        if tl.max(scaled, 0) >= floor:
            score = tl.where(scaled >= floor, scaled + _gumbel(start, seed, choice, position, BLOCK), float("-inf"))
            better = score > scores
            scores = tl.where(better, score, scores)
            tokens = tl.where(better, start + tl.arange(0, BLOCK), tokens)
    winners = tl.where(scores == tl.max(scores, 0), tokens, vocab)
    # A row of NaN has no winner; 0 is as valid an id as any.
    token = tl.min(winners, 0)
    tl.store(drawn + tl.program_id(0), tl.where(token < vocab, token, 0).to(tl.int64))


@triton.jit
def _noise_kernel(seeds, choices, positions, noise, vocab, BLOCK: tl.constexpr):
    """Grid (rows, parts of the vocabulary)."""
    row, start = tl.program_id(0), tl.program_id(1) * BLOCK
    token = start + tl.arange(0, BLOCK)
    drawn = _gumbel(start, tl.load(seeds + row), tl.load(choices + row), tl.load(positions + row), BLOCK)
    tl.store(noise + row.to(tl.int64) * vocab + token, drawn, mask=token < vocab)


_draw = Launcher(_draw_kernel)
_make_noise = Launcher(_noise_kernel)


def draw_tokens(
    logits: torch.Tensor,
    first: int,
    temperature: torch.Tensor,
    truncation: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    noise: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Rows ``first`` .. S-1 of (S, V) float32 logits -> (S - first,) int64 token ids.

    ``truncation`` is (S,) float32 top_p and min_p and int64 top_k, ``noise`` (S,) int64 seeds, choices and positions.
    """
    rows, vocab = logits.shape
    drawn = torch.empty(rows - first, dtype=torch.int64, device=logits.device)
    _draw(
        (rows - first, 1, 1),
        (logits, drawn, temperature, *truncation, *noise),
        fixed=(logits.stride(0), vocab),
        free=(first,),
        constants=(SEARCH_BLOCK, BLOCK),
        warps=DRAW_WARPS,
    )
    return drawn


def gumbel_noise(seeds: torch.Tensor, choices: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """As ``reference.gumbel_noise``, for contiguous inputs."""
    noise = torch.empty((seeds.shape[0], vocab), device=seeds.device)
    parts = -(-vocab // NOISE_BLOCK)
    _make_noise(
        (seeds.shape[0], parts, 1),
        (seeds, choices, positions, noise),
        fixed=(vocab,),
        free=(),
        constants=(NOISE_BLOCK,),
    )
    return noise
