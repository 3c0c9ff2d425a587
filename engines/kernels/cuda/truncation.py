"""What a row rules out before it draws: one bound a row, found by many programs at once.

Min-p needs the row's best logit. Top-k and top-p need the largest logit at or above which there are enough tokens, or
enough of the mass. That logit is found digit by digit of its bits, in three launches: each adds up the row's tokens by
their next digit, and the last program of a row to arrive takes the digit that holds the wanted one. Masses are added
as integers, so that their order does not matter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engines.kernels import row_parameters
from engines.kernels.cuda.launch import Launcher

TOP_K, TEMPERATURE = tl.constexpr(row_parameters.TOP_K), tl.constexpr(row_parameters.TEMPERATURE)
TOP_P, MIN_P = tl.constexpr(row_parameters.TOP_P), tl.constexpr(row_parameters.MIN_P)
FIELDS = tl.constexpr(row_parameters.FIELDS)
GREEDY_BELOW = tl.constexpr(row_parameters.GREEDY_BELOW)
PART = 2048
"""Tokens of the vocabulary that one program looks at."""
BINS = 2048
SHIFTS = (21, 10, 0)
"""Of the three digits of a float's 32 bits."""
MASS = tl.constexpr(float(1 << 44))
"""What a probability of one beside the best token's counts: sums of 2**18 tokens stay below 2**63."""


@dataclass(frozen=True, slots=True)
class Truncates:
    """Which kinds of truncation any row of a step asks for."""

    top_k: bool
    top_p: bool
    min_p: bool

    @property
    def any(self) -> bool:
        return self.top_k or self.top_p or self.min_p


@dataclass(frozen=True, slots=True)
class _Scratch:
    sums: torch.Tensor
    """(rows, BINS) int64 zeros: the last program of a row sets them back."""
    arrivals: torch.Tensor
    """(rows,) int32 zeros, likewise."""


@functools.cache
def _scratch(device: torch.device, rows: int) -> _Scratch:
    return _Scratch(
        torch.zeros((rows, BINS), dtype=torch.int64, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
    )


@triton.jit
def _key(value):
    """A float's bits as uint32 in the order of the floats."""
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def _value(key):
    """The float of such a key."""
    bits = tl.where(key >= 0x80000000, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def divided(value, temperature):
    """Rounded as the division of two floats, which Triton's own operator is not."""
    return tl.math.div_rn(value, temperature + tl.zeros_like(value))


@triton.jit
def _arrived_last(arrivals, row):
    """Whether this program is the row's last; all that the others wrote can then be read."""
    tl.debug_barrier()
    last = tl.atomic_add(arrivals + row, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(arrivals + row, 0)
    return last


@triton.jit
def _best_kernel(
    logits,
    slots,
    places,
    parameters,
    arrivals,
    part_best,
    best,
    least,
    floors,
    stride,
    vocab,
    parts,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (parts, rows): a row's best logit, and what min-p rules out."""
    part, row = tl.program_id(0), tl.program_id(1)
    if tl.load(places + row) == 0:
        return
    token = part * PART + tl.arange(0, PART)
    value = tl.load(logits + row.to(tl.int64) * stride + token, mask=token < vocab, other=float("-inf"))
    tl.store(part_best + row * parts + part, tl.max(value.to(tl.float32), 0))
    if _arrived_last(arrivals, row):
        line = parameters + tl.load(slots + row).to(tl.int64) * FIELDS
        temperature = tl.load(line + TEMPERATURE).to(tl.float32, bitcast=True)
        min_p = tl.load(line + MIN_P).to(tl.float32, bitcast=True)
        one = tl.arange(0, PARTS)
        highest = tl.max(tl.load(part_best + row * parts + one, mask=one < parts, other=float("-inf")), 0)
        floor = tl.full((), float("-inf"), tl.float32)
        if (min_p > 0.0) & (temperature >= GREEDY_BELOW):
            floor = divided(highest, temperature) + tl.log(min_p.to(tl.float64)).to(tl.float32)
        tl.store(best + row, highest)
        # Bounds are found among the logits and compared once divided, so that what is equal then stays together.
        tl.store(least + row, floor * tl.maximum(temperature, GREEDY_BELOW))
        tl.store(floors + row, floor)


@triton.jit
def _digit_kernel(
    logits,
    slots,
    places,
    parameters,
    arrivals,
    sums,
    best,
    least,
    floors,
    prefixes,
    targets,
    stride,
    vocab,
    BY_MASS: tl.constexpr,
    SHIFT: tl.constexpr,
    DIGITS: tl.constexpr,
    PART: tl.constexpr,
    BINS: tl.constexpr,
):
    """Grid (parts, rows): one digit of the bound of top-p (BY_MASS) or top-k. SHIFT counts the bits below it."""
    part, row = tl.program_id(0), tl.program_id(1)
    if tl.load(places + row) == 0:
        return
    line = parameters + tl.load(slots + row).to(tl.int64) * FIELDS
    temperature = tl.load(line + TEMPERATURE).to(tl.float32, bitcast=True)
    top_k, top_p = tl.load(line + TOP_K), tl.load(line + TOP_P).to(tl.float32, bitcast=True)
    wanted = top_p < 1.0 if BY_MASS else top_k > 0
    if (temperature < GREEDY_BELOW) | (wanted == 0):
        return
    token = part * PART + tl.arange(0, PART)
    value = tl.load(logits + row.to(tl.int64) * stride + token, mask=token < vocab, other=float("-inf"))
    value = value.to(tl.float32)
    key = _key(value)
    counted = (value >= tl.load(least + row)) & (value > float("-inf"))
    if SHIFT + DIGITS < 32:
        counted = counted & ((key >> (SHIFT + DIGITS)) == tl.load(prefixes + row).to(tl.uint32, bitcast=True))
    digit = ((key >> SHIFT) & ((1 << DIGITS) - 1)).to(tl.int32)
    if BY_MASS:
        weight = (tl.exp((value - tl.load(best + row)) * (1.0 / temperature)) * MASS).to(tl.int64)
    else:
        weight = tl.full((PART,), 1, tl.int64)
    line_sums = sums + row.to(tl.int64) * BINS
    tl.atomic_add(line_sums + digit, weight, mask=counted, sem="relaxed")
    if _arrived_last(arrivals, row):
        bins = tl.arange(0, BINS)
        mass = tl.load(line_sums + bins)
        tl.store(line_sums + bins, tl.zeros((BINS,), tl.int64))
        total = tl.sum(mass, 0)
        above = total - tl.cumsum(mass, 0) + mass
        if SHIFT + DIGITS < 32:
            target = tl.load(targets + row)
        elif BY_MASS:
            target = (total.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64)
        else:
            target = top_k.to(tl.int64)
        # The sums fall with the digit: as many digits after the first are low enough as have enough above them.
        chosen = tl.maximum(tl.sum((above >= target).to(tl.int32), 0) - 1, 0)
        beyond = tl.sum(tl.where(bins > chosen, mass, 0), 0)
        found = chosen.to(tl.uint32)
        if SHIFT + DIGITS < 32:
            found = (tl.load(prefixes + row).to(tl.uint32, bitcast=True) << DIGITS) | found
        tl.store(prefixes + row, found.to(tl.int32, bitcast=True))
        tl.store(targets + row, target - beyond)
        if SHIFT == 0:
            kept = _value(found)
            tl.store(least + row, tl.maximum(tl.load(least + row), kept))
            tl.store(floors + row, tl.maximum(tl.load(floors + row), divided(kept, temperature)))


_find_best = Launcher(_best_kernel)
_find_digit = Launcher(_digit_kernel)


def truncation_floors(
    logits: torch.Tensor,
    slots: torch.Tensor,
    places: torch.Tensor,
    parameters: torch.Tensor,
    truncates: Truncates,
) -> torch.Tensor:
    """(S,) float32: the lowest logit over temperature that each row of (S, V) admits, -inf where it admits all.

    The arguments are those of ``sampling.draw_rows``.
    """
    rows, vocab = logits.shape
    parts = -(-vocab // PART)
    device = logits.device
    best, least, floors = torch.empty((3, -(-rows // 4) * 4), dtype=torch.float32, device=device)
    part_best = torch.empty((rows, parts), dtype=torch.float32, device=device)
    prefixes = torch.empty(rows, dtype=torch.int32, device=device)
    targets = torch.empty(rows, dtype=torch.int64, device=device)
    scratch = _scratch(device, triton.next_power_of_2(rows))
    _find_best(
        (parts, rows, 1),
        (logits, slots, places, parameters, scratch.arrivals, part_best, best, least, floors),
        fixed=(logits.stride(0), vocab, parts),
        free=(),
        constants=(PART, triton.next_power_of_2(parts)),
    )
    inputs = (logits, slots, places, parameters, scratch.arrivals, scratch.sums)
    for by_mass in [False] * truncates.top_k + [True] * truncates.top_p:
        for shift, above in zip(SHIFTS, (32, *SHIFTS), strict=False):
            _find_digit(
                (parts, rows, 1),
                (*inputs, best, least, floors, prefixes, targets),
                fixed=(logits.stride(0), vocab),
                free=(),
                constants=(by_mass, shift, above - shift, PART, BINS),
                warps=8,
            )
    found: torch.Tensor = floors[:rows]
    return found
