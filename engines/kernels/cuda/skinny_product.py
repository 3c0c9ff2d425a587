"""The products of the skinny kernel: a tile of weight lines, block by block along the depth, several on the way."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch(start, BYTES: tl.constexpr):
    """Ask the L2 cache for ``BYTES`` at each different ``start`` of a warp: that takes one instruction for each."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,n",
        [start.to(tl.int64), BYTES],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def narrow_product(
    x,
    weight_lines,
    gain,
    row_starts,
    valid,
    prefetched,
    start,
    end,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    NORM: tl.constexpr,
    EVEN: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) products over ``start .. end`` of the depth and each row's sum of squares, float32.

    The weight is the left operand, whose tiles are 16 lines; of the right one's, 8 rows are enough. The block of the
    depth is cut into ``PARTS``, one a warp: a chain of small matrix instructions would otherwise take longer than the
    bytes.
    """
    piece: tl.constexpr = BLOCK_K // PARTS
    place = (tl.arange(0, PARTS) * piece)[:, None, None] + tl.arange(0, piece)[None, None, :]
    weight_at = weight_lines[None, :, None] + place
    x_at = x + row_starts[None, :, None] + place
    valid_rows = valid[None, :, None]
    sums = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((PARTS, BLOCK_M, piece), tl.float32)
    for k in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        if AHEAD > 0:
            prefetch(prefetched + tl.minimum(k + AHEAD, end - BLOCK_K), 2 * BLOCK_K)
        if EVEN:
            block = tl.load(weight_at + k)
            values = tl.load(x_at + k, mask=valid_rows, other=0.0)
        else:
            inside = place + k < depth
            block = tl.load(weight_at + k, mask=inside, other=0.0)
            values = tl.load(x_at + k, mask=valid_rows & inside, other=0.0)
        if NORM:
            if EVEN:
                gains = tl.load(gain + place + k).to(tl.float32)
            else:
                gains = tl.load(gain + place + k, mask=inside, other=0.0).to(tl.float32)
            wide = values.to(tl.float32)
            squares += wide * wide
            values = (wide * gains).to(block.dtype)
        sums = tl.dot(block, tl.permute(values, (0, 2, 1)), sums)
    return tl.trans(tl.sum(sums, 0)), tl.sum(tl.sum(squares, 2), 0)


@triton.jit
def wide_product(
    x,
    weight_lines,
    gain,
    row_starts,
    valid,
    prefetched,
    start,
    end,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    NORM: tl.constexpr,
    EVEN: tl.constexpr,
):
    """As ``narrow_product``, uncut, for BLOCK_N >= 64: Hopper's wide matrix instructions read both operands from shared
    memory."""
    place = tl.arange(0, BLOCK_K)
    weight_at = weight_lines[:, None] + place[None, :]
    x_at = x + row_starts[:, None] + place[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        if AHEAD > 0:
            prefetch(prefetched + tl.minimum(k + AHEAD, end - BLOCK_K), 2 * BLOCK_K)
        if EVEN:
            block = tl.load(weight_at + k)
            values = tl.load(x_at + k, mask=valid[:, None], other=0.0)
        else:
            inside = (place + k < depth)[None, :]
            block = tl.load(weight_at + k, mask=inside, other=0.0)
            values = tl.load(x_at + k, mask=valid[:, None] & inside, other=0.0)
        if NORM:
            if EVEN:
                gains = tl.load(gain + place + k).to(tl.float32)
            else:
                gains = tl.load(gain + place + k, mask=place + k < depth, other=0.0).to(tl.float32)
            wide = values.to(tl.float32)
            squares += wide * wide
            values = (wide * gains[None, :]).to(block.dtype)
        sums = tl.dot(block, tl.trans(values), sums)
    return tl.trans(sums), tl.sum(squares, 1)
