"""What stands before the model in a step on a GPU: changes of resident state, and the inputs of each token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engines.kernels.cuda.launch import Launcher

SCATTER_BLOCK = 1024
TOKENS = 128
"""Flat tokens of a program that prepares inputs."""


@triton.jit
def _scatter_kernel(packed, state, BLOCK: tl.constexpr):
    """Grid (segments, parts): copy segment after segment of the packed words to its place in the state."""
    segment = packed + 3 * tl.program_id(0)
    target, length, source = tl.load(segment), tl.load(segment + 1), tl.load(segment + 2)
    for begin in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        word = begin + tl.arange(0, BLOCK)
        inside = word < length
        tl.store(state + target + word, tl.load(packed + source + word, mask=inside, other=0), mask=inside)


@triton.jit(do_not_specialize=["rows", "count"])
def _prepare_kernel(
    query_starts,
    context_lengths,
    slots,
    tokens,
    tables,
    token_ids,
    positions,
    cache_slots,
    token_stride,
    table_stride,
    rows,
    count,
    BLOCK_SIZE: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (parts of the flat tokens,). ``rows`` is a bound; tokens from the last row's end on are padding."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < count
    present = token < tl.load(query_starts + rows)
    # The last row that begins at or before the token; rows without tokens begin where the next one does.
    low = tl.zeros((BLOCK,), tl.int32)
    high = tl.zeros((BLOCK,), tl.int32) + rows
    for _ in range(SEARCH_STEPS):
        middle = (low + high) // 2
        right = tl.load(query_starts + middle, mask=present, other=0) <= token
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    end = tl.load(query_starts + low + 1, mask=present, other=0)
    position = tl.load(context_lengths + low, mask=present, other=0) - (end - token)
    slot = tl.load(slots + low, mask=present, other=0).to(tl.int64)
    identity = tl.load(tokens + slot * token_stride + position, mask=present, other=0)
    block = tl.load(tables + slot * table_stride + position // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
    cache_slot = block * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(token_ids + token, identity.to(tl.int64), mask=inside)
    tl.store(positions + token, tl.where(present, position, 0).to(tl.int64), mask=inside)
    tl.store(cache_slots + token, tl.where(present, cache_slot, -1), mask=inside)


_scatter = Launcher(_scatter_kernel)
_prepare = Launcher(_prepare_kernel)


def scatter(packed: torch.Tensor, state: torch.Tensor, segments: int, longest: int) -> None:
    """Write segments into the flat int32 ``state``.

    ``packed`` is int32: three words a segment (target in the state, length, source in ``packed``), then their words.
    """
    parts = min(8, -(-longest // SCATTER_BLOCK))
    _scatter((segments, parts, 1), (packed, state), fixed=(), free=(), constants=(SCATTER_BLOCK,))


def prepare_tokens(
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    sequences: torch.Tensor,
    tables: torch.Tensor,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    block_size: int,
) -> None:
    """Ids, positions and cache slots of all flat tokens of a step.

    ``rows`` is (R+1,) query starts, (R,) context lengths and (R,) slots; ``sequences`` (slots, length) and ``tables``
    (slots, widest) have a line for each slot, all int32. ``outputs`` are (T,) int64 token ids, positions and cache
    slots; tokens past the last row's end become padding: id 0, position 0, cache slot -1.
    """
    count, bound = outputs[0].shape[0], rows[1].shape[0]
    _prepare(
        (-(-count // TOKENS), 1, 1),
        (*rows, sequences, tables, *outputs),
        fixed=(sequences.stride(0), tables.stride(0)),
        free=(bound, count),
        constants=(block_size, bound.bit_length(), TOKENS),
    )
