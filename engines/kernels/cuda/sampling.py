"""Draws of whole batches, each row by its slot's own parameters, spread over the vocabulary.

Rows that truncate first find their lowest admitted logit (``truncation``); then every part of the vocabulary finds the
highest rank among its tokens, and one program a row looks again at the part, seldom more, that holds the winner.
Nothing of it depends on a row's neighbours, and the token is the one that ``reference.gumbel_noise`` and exact
arithmetic give.

A token's score is its scaled logit plus ``-ln(-ln u)``, which takes two logarithms in float64. Its rank is an upper
bound that takes one instruction for its logarithm: with d = 1 - u, ``-ln(1 - d) >= d``, so the noise is at most
``-ln d``, and hardly less where a token can win. So the first token in rank is scored exactly, and then only those
that rank above that score.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engines.kernels import row_parameters
from engines.kernels.cuda.device import machine_at
from engines.kernels.cuda.launch import Launcher
from engines.kernels.cuda.truncation import Truncates, divided, truncation_floors

PART = 2048
"""Tokens of the vocabulary that one program ranks."""
NOISE_BLOCK = 1024

SEED, CHOICE = tl.constexpr(row_parameters.SEED), tl.constexpr(row_parameters.CHOICE)
PROMPT_LENGTH = tl.constexpr(row_parameters.PROMPT_LENGTH)
TEMPERATURE, FIELDS = tl.constexpr(row_parameters.TEMPERATURE), tl.constexpr(row_parameters.FIELDS)
GREEDY_BELOW = tl.constexpr(row_parameters.GREEDY_BELOW)
LOG2_E = tl.constexpr(1.4426950408889634)
UNIFORM_BITS = tl.constexpr(24.0)
RANK_ERROR = tl.constexpr(1e-4)
"""More than a rank can be too low by where scaled logits are small: two logarithms of a few ulp at values under 25."""
RELATIVE_ERROR = tl.constexpr(2.0**-19)
"""The same as a share of a large scaled logit: its division and two sums, a few roundings of 2**-24 each."""
LARGEST_ERROR = tl.constexpr(1e30)
PHILOX_A, PHILOX_B = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
PHILOX_STEP_A, PHILOX_STEP_B = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
PHILOX_ROUNDS = tl.constexpr(10)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _philox(group, position, choice, seed_low, seed_high):
    """Four words of 32 bits for each counter (group, position, choice, 0). Only ``group`` may be a block: what does
    not depend on it is computed once a thread."""
    c0, c1, c2 = group.to(tl.uint32), position.to(tl.uint32, bitcast=True), choice.to(tl.uint32, bitcast=True)
    c3 = c1 ^ c1
    key_low, key_high = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(PHILOX_ROUNDS):
        product_a, product_b = c0.to(tl.uint64) * PHILOX_A, c2.to(tl.uint64) * PHILOX_B
        c0, c2 = (product_b >> 32).to(tl.uint32) ^ c1 ^ key_low, (product_a >> 32).to(tl.uint32) ^ c3 ^ key_high
        c1, c3 = product_b.to(tl.uint32), product_a.to(tl.uint32)
        key_low, key_high = key_low + PHILOX_STEP_A, key_high + PHILOX_STEP_B
    return c0, c1, c2, c3


@triton.jit
def _words(start, seed_low, seed_high, choice, position, BLOCK: tl.constexpr):
    """24 random bits for each of the tokens ``start .. start+BLOCK-1``, ``start`` a multiple of four."""
    w0, w1, w2, w3 = _philox(start // 4 + tl.arange(0, BLOCK // 4), position, choice, seed_low, seed_high)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)) >> 8


@triton.jit
def _exact_noise(words):
    """As ``reference.gumbel_noise`` defines it."""
    uniform = (words.to(tl.float64) + 0.5) * (1.0 / 16777216.0)
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _near_log2(value, COMPILED: tl.constexpr):
    """One instruction, wrong by at most 2**-22, or so many times the result."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log2(value)


@triton.jit
def _ranks(
    logits, floor, start, vocab, line, place, TRUNCATED: tl.constexpr, PART: tl.constexpr, COMPILED: tl.constexpr
):
    """Of the tokens ``start .. start+PART-1``: logits where the row is greedy, else at least their scores, in units of
    ln 2 and less ``UNIFORM_BITS``; -inf for what cannot be drawn."""
    token = start + tl.arange(0, PART)
    value = tl.load(logits + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    temperature = _float(tl.load(line + TEMPERATURE))
    if temperature < GREEDY_BELOW:
        rank = value
    else:
        position = place - tl.load(line + PROMPT_LENGTH)
        words = _words(start, tl.load(line + SEED), tl.load(line + SEED + 1), tl.load(line + CHOICE), position, PART)
        # 1 - u in units of 2**-24; the sum rounds where it is large, which matters as little as the logarithm's error.
        distance = (16777215 - words.to(tl.int32)).to(tl.float32) + 0.5
        scaled = value * (LOG2_E / temperature)
        rank = scaled - _near_log2(distance, COMPILED)
        if TRUNCATED:
            # What is just below the floor is told from it when it is scored.
            lowest = floor * LOG2_E - tl.minimum(tl.abs(floor) * RELATIVE_ERROR, LARGEST_ERROR)
            rank = tl.where(scaled >= lowest, rank, float("-inf"))
    return rank


@triton.jit
def _part_kernel(
    logits,
    floors,
    slots,
    places,
    parameters,
    part_ranks,
    stride,
    vocab,
    TRUNCATED: tl.constexpr,
    PART: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Grid (parts, rows): the highest rank among PART tokens."""
    part, row = tl.program_id(0), tl.program_id(1)
    line = parameters + tl.load(slots + row).to(tl.int64) * FIELDS
    place, floor = tl.load(places + row), tl.load(floors + row) if TRUNCATED else 0.0
    rank = _ranks(logits + row.to(tl.int64) * stride, floor, part * PART, vocab, line, place, TRUNCATED, PART, COMPILED)
    tl.store(part_ranks + row * tl.num_programs(0) + part, tl.max(rank, 0))


@triton.jit
def _score(logits, token, floor, line, place, TRUNCATED: tl.constexpr):
    """Of one token: what the row draws by, and what no token that ranks up to it can reach."""
    value = tl.load(logits + token).to(tl.float32)
    temperature = _float(tl.load(line + TEMPERATURE))
    score, bound = value, value
    if temperature >= GREEDY_BELOW:
        position = place - tl.load(line + PROMPT_LENGTH)
        w0, w1, w2, w3 = _philox(
            token // 4, position, tl.load(line + CHOICE), tl.load(line + SEED), tl.load(line + SEED + 1)
        )
        lane = token % 4
        word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
        scaled = divided(value, temperature)
        score = scaled + _exact_noise(word >> 8)
        if TRUNCATED:
            score = tl.where(scaled >= floor, score, float("-inf"))
        error = tl.minimum(RANK_ERROR + tl.abs(score) * RELATIVE_ERROR, LARGEST_ERROR)
        bound = (score - error) * LOG2_E - UNIFORM_BITS
    return score, bound


@triton.jit
def _take_kernel(
    logits,
    floors,
    slots,
    places,
    parameters,
    part_ranks,
    tokens,
    drawn,
    stride,
    parts,
    token_stride,
    vocab,
    TRUNCATED: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Grid (rows,): the token of the best score, into ``drawn`` and into the row's sequence. The lowest wins a tie."""
    row = tl.program_id(0)
    place = tl.load(places + row)
    if place == 0:
        return
    slot = tl.load(slots + row).to(tl.int64)
    line = parameters + slot * FIELDS
    floor = tl.load(floors + row) if TRUNCATED else 0.0
    row_logits = logits + row.to(tl.int64) * stride
    part = tl.arange(0, PARTS)
    highest = tl.load(part_ranks + row * parts + part, mask=part < parts, other=float("-inf"))
    best, bound = tl.full((), float("-inf"), tl.float32), tl.full((), float("-inf"), tl.float32)
    winner = tl.full((), 2147483647, tl.int32)
    part_rank = tl.max(highest, 0)
    while part_rank > bound:
        chosen = tl.min(tl.where(highest == part_rank, part, 2147483647), 0)
        highest = tl.where(part == chosen, float("-inf"), highest)
        rank = _ranks(row_logits, floor, chosen * PART, vocab, line, place, TRUNCATED, PART, COMPILED)
        token = chosen * PART + tl.arange(0, PART)
        top = tl.max(rank, 0)
        while top > bound:
            first = tl.min(tl.where(rank == top, token, 2147483647), 0)
            rank = tl.where(token == first, float("-inf"), rank)
            score, reached = _score(row_logits, first, floor, line, place, TRUNCATED)
            winner = tl.where((score > best) | ((score == best) & (first < winner)), first, winner)
            best, bound = tl.maximum(best, score), tl.maximum(bound, reached)
            top = tl.max(rank, 0)
        part_rank = tl.max(highest, 0)
    # A row of NaN has no winner; 0 is as valid an id as any.
    winner = tl.where(winner < vocab, winner, 0)
    tl.store(drawn + row, winner.to(tl.int64))
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


_rank_parts = Launcher(_part_kernel)
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
    parts, compiled = -(-vocab // PART), machine_at(logits.device) is not None
    floors = truncation_floors(logits, slots, places, parameters, truncates) if truncates.any else logits
    ranks = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    _rank_parts(
        (parts, rows, 1),
        (logits, floors, slots, places, parameters, ranks),
        fixed=(logits.stride(0), vocab),
        free=(),
        constants=(truncates.any, PART, compiled),
    )
    _take_best(
        (rows, 1, 1),
        (logits, floors, slots, places, parameters, ranks, tokens, drawn),
        fixed=(logits.stride(0), parts, tokens.stride(0), vocab),
        free=(),
        constants=(truncates.any, PART, triton.next_power_of_2(parts), compiled),
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
