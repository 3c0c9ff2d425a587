"""How the programs that share a row put it together: the one that finishes last adds the parts of all."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def used_splits(cached, splits, TILE_N: tl.constexpr, COMBINED: tl.constexpr):
    """Programs that share a row: one a tile while all fit in one round of combining, then one for two tiles."""
    tiles = tl.maximum(1, tl.cdiv(cached, TILE_N))
    return tl.minimum(splits, tl.maximum(tl.minimum(tiles, COMBINED), tl.cdiv(tiles, 2)))


@triton.jit
def _store_combined(parts, logs, used, target, GROUP, GROUP_BLOCK, DIM, DIM_BLOCK, COMBINED: tl.constexpr):
    """The sums of a row's splits, weighted by their logarithms, in the order of the splits: (heads, dims).

    The loads pass by the first cache, which knows nothing of other processors' stores.
    """
    head, dims = tl.arange(0, GROUP_BLOCK), tl.arange(0, DIM_BLOCK)
    is_head = (head < GROUP)[:, None]
    best = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    sums = tl.zeros((GROUP_BLOCK, DIM_BLOCK), tl.float32)
    for first in range(0, used, COMBINED):
        split = first + tl.arange(0, COMBINED)
        # Heads before splits: a head's splits then lie in one thread, which needs no other to add them.
        entry = split[None, :] * GROUP + head[:, None]
        mask = (split < used)[None, :] & is_head
        log = tl.load(logs + entry, mask=mask, other=float("-inf"), cache_modifier=".cg")
        whole = mask[:, :, None] & (dims < DIM)[None, None, :]
        place = entry[:, :, None] * DIM + dims[None, None, :]
        part = tl.load(parts + place, mask=whole, other=0.0, cache_modifier=".cg")
        log = tl.where(is_head, log, 0.0)
        higher = tl.maximum(best, tl.max(log, 1))
        weights = tl.exp2(log - higher[:, None])
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.sum(part * weights[:, :, None], 1)
        best = higher
    mask = is_head & (dims < DIM)[None, :]
    result = (sums / total[:, None]).to(target.dtype.element_ty)
    tl.store(target + head[:, None] * DIM + dims[None, :], result, mask=mask)


@triton.jit
def store_row(
    result,
    log,
    target,
    parts,
    logs,
    arrivals,
    split,
    used,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    TILE_M: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    COMBINED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The whole result of a row that one program had to itself; else this split's, and the row's if it is the last."""
    head, dims = tl.arange(0, TILE_M), tl.arange(0, DIM_BLOCK)
    mask = (head < GROUP)[:, None] & (dims < DIM)[None, :]
    place = head[:, None] * DIM + dims[None, :]
    if (not SPLIT) or used == 1:
        tl.store(target + place, result.to(target.dtype.element_ty), mask=mask)
    else:
        tl.store(parts + split * GROUP * DIM + place, result, mask=mask)
        tl.store(logs + split * GROUP + head, log, mask=head < GROUP)
        # All threads' stores come before the one thread's count, which releases them.
        tl.debug_barrier()
        if tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == used - 1:
            _store_combined(parts, logs, used, target, GROUP, GROUP_BLOCK, DIM, DIM_BLOCK, COMBINED)
            tl.store(arrivals, 0)
