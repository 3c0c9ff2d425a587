"""Draws of whole batches, each row by its slot's own parameters, spread over the vocabulary.

Rows that truncate first find their lowest admitted logit (``truncation``); then every part of the vocabulary finds its
winner, and one program a row takes the best of them. Nothing of it depends on a row's neighbours, and the token is the
one that ``reference.gumbel_noise`` and exact arithmetic give.

The noise is defined in float64, which is slow on many GPUs: a part of the vocabulary is ranked by noise in float32,
whose error is bounded, and only the few tokens that may win by that bound are computed as defined.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engines.kernels import row_parameters
from engines.kernels.cuda.launch import Launcher
from engines.kernels.cuda.truncation import Truncates, truncation_floors

PART = 2048
"""Tokens of the vocabulary that one program draws among."""
NOISE_BLOCK = 1024

SEED, CHOICE = tl.constexpr(row_parameters.SEED), tl.constexpr(row_parameters.CHOICE)
PROMPT_LENGTH = tl.constexpr(row_parameters.PROMPT_LENGTH)
TEMPERATURE, FIELDS = tl.constexpr(row_parameters.TEMPERATURE), tl.constexpr(row_parameters.FIELDS)
GREEDY_BELOW = tl.constexpr(row_parameters.GREEDY_BELOW)
NOISE_ERROR = tl.constexpr(1e-4)
"""More than ranking by float32 noise can be wrong by: two logarithms of a few ulp at values under 20."""


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _words(start, seed_low, seed_high, choice, position, BLOCK: tl.constexpr):
    """24 random bits for each of the tokens ``start .. start+BLOCK-1``, ``start`` a multiple of four."""
    group = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros((BLOCK // 4,), tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        group,
        zero + position.to(tl.uint32, bitcast=True),
        zero + choice.to(tl.uint32, bitcast=True),
        zero,
        zero + seed_low.to(tl.uint32, bitcast=True),
        zero + seed_high.to(tl.uint32, bitcast=True),
    )
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)) >> 8


@triton.jit
def _exact_noise(words):
    """As ``reference.gumbel_noise`` defines it."""
    uniform = (words.to(tl.float64) + 0.5) * (1.0 / 16777216.0)
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _near_noise(words):
    """The noise in float32. Near one, the logarithm is taken of the distance to one, which float32 holds exactly."""
    upper = words >= 8388608
    low = (words.to(tl.float32) + 0.5) * (1.0 / 16777216.0)
    distance = ((16777216 - words.to(tl.int32)).to(tl.float32) - 0.5) * (1.0 / 16777216.0)
    # log(1 - d) with an error far below NOISE_ERROR: the series for small d, the logarithm itself above.
    series = distance * (1.0 + distance * (0.5 + distance * (1.0 / 3.0 + distance * 0.25)))
    negative = tl.where(upper & (distance < 0.01), series, -tl.log(tl.where(upper, 1.0 - distance, low)))
    return -tl.log(negative)


@triton.jit
def _load(logits, start, vocab, BLOCK: tl.constexpr):
    token = start + tl.arange(0, BLOCK)
    return tl.load(logits + token, mask=token < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def _divided(value, temperature):
    """Rounded as the division of two floats, which Triton's own operator is not."""
    return tl.math.div_rn(value, temperature + tl.zeros_like(value))


@triton.jit
def _part_kernel(
    logits,
    floors,
    slots,
    places,
    parameters,
    part_scores,
    part_tokens,
    stride,
    vocab,
    TRUNCATED: tl.constexpr,
    PART: tl.constexpr,
):
    """Grid (parts, rows): score and token of the winner among PART tokens; the lowest token wins a tie."""
    part, row = tl.program_id(0), tl.program_id(1)
    place = tl.load(places + row)
    if place == 0:
        return
    start = part * PART
    token = start + tl.arange(0, PART)
    line = parameters + tl.load(slots + row).to(tl.int64) * FIELDS
    temperature = _float(tl.load(line + TEMPERATURE))
    value = _load(logits + row.to(tl.int64) * stride, start, vocab, PART)
    if temperature < GREEDY_BELOW:
        best = tl.max(value, 0)
        winner = tl.min(tl.where((value == best) & (token < vocab), token, 2147483647), 0)
    else:
        scaled = _divided(value, temperature)
        admitted = scaled > float("-inf")
        if TRUNCATED:
            admitted = admitted & (scaled >= tl.load(floors + row))
        position = place - tl.load(line + PROMPT_LENGTH)
        seed_low, seed_high, choice = tl.load(line + SEED), tl.load(line + SEED + 1), tl.load(line + CHOICE)
        words = _words(start, seed_low, seed_high, choice, position, PART)
        near = tl.where(admitted, scaled + _near_noise(words), float("-inf"))
        bound = tl.max(near, 0) - NOISE_ERROR
        candidate = admitted & (near >= bound)
        best = tl.full((), float("-inf"), tl.float32)
        winner = tl.full((), 2147483647, tl.int32)
        for _ in range(tl.sum(candidate.to(tl.int32), 0)):
            first = tl.min(tl.where(candidate, token, 2147483647), 0)
            chosen = token == first
            word = tl.sum(tl.where(chosen, words, 0).to(tl.int32), 0)
            score = tl.sum(tl.where(chosen, scaled, 0.0), 0) + _exact_noise(word)
            winner = tl.where(score > best, first, winner)
            best = tl.maximum(score, best)
            candidate = candidate & (token != first)
    entry = row * tl.num_programs(0) + part
    tl.store(part_scores + entry, best)
    tl.store(part_tokens + entry, winner)


@triton.jit
def _take_kernel(
    part_scores, part_tokens, slots, places, tokens, drawn, parts, token_stride, vocab, BLOCK: tl.constexpr
):
    """Grid (rows,): the best part's token, into ``drawn`` and into the row's sequence."""
    row = tl.program_id(0)
    place = tl.load(places + row)
    if place == 0:
        return
    part = tl.arange(0, BLOCK)
    mask = part < parts
    score = tl.load(part_scores + row * parts + part, mask=mask, other=float("-inf"))
    token = tl.load(part_tokens + row * parts + part, mask=mask, other=2147483647)
    winner = tl.min(tl.where((score == tl.max(score, 0)) & mask, token, 2147483647), 0)
    # A row of NaN has no winner; 0 is as valid an id as any.
    winner = tl.where(winner < vocab, winner, 0)
    tl.store(drawn + row, winner.to(tl.int64))
    slot = tl.load(slots + row).to(tl.int64)
    tl.store(tokens + slot * token_stride + place, winner)


@triton.jit
def _noise_kernel(seeds, choices, positions, noise, vocab, BLOCK: tl.constexpr):
    """Grid (rows, parts of the vocabulary)."""
    row, start = tl.program_id(0), tl.program_id(1) * BLOCK
    token = start + tl.arange(0, BLOCK)
    seed = tl.load(seeds + row)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    choice, position = tl.load(choices + row).to(tl.int32), tl.load(positions + row).to(tl.int32)
    words = _words(start, low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True), choice, position, BLOCK)
    tl.store(noise + row.to(tl.int64) * vocab + token, _exact_noise(words), mask=token < vocab)


_draw_parts = Launcher(_part_kernel)
_take_best = Launcher(_take_kernel)
_make_noise = Launcher(_noise_kernel)


def draw_rows(
    logits: torch.Tensor,
    slots: torch.Tensor,
    places: torch.Tensor,
    parameters: torch.Tensor,
    tokens: torch.Tensor,
    drawn: torch.Tensor,
    truncates: Truncates,
) -> None:
    """Draw one token for each row of (S, V) logits into ``drawn`` (S,) int64 and into its sequence.

    Row r has the parameters of slot ``slots[r]``, a line of (slots, FIELDS) int32, and its token goes to
    ``tokens[slots[r], places[r]]``. ``slots`` and ``places`` are (S,) int32; a row with place 0 draws nothing.
    ``truncates`` says what any of the rows asks for.
    """
    rows, vocab = logits.shape
    parts = -(-vocab // PART)
    floors = truncation_floors(logits, slots, places, parameters, truncates) if truncates.any else logits
    scores = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    winners = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    _draw_parts(
        (parts, rows, 1),
        (logits, floors, slots, places, parameters, scores, winners),
        fixed=(logits.stride(0), vocab),
        free=(),
        constants=(truncates.any, PART),
        warps=8,
    )
    _take_best(
        (rows, 1, 1),
        (scores, winners, slots, places, tokens, drawn),
        fixed=(parts, tokens.stride(0), vocab),
        free=(),
        constants=(triton.next_power_of_2(parts),),
        warps=1,
    )


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
