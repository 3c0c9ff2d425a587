"""How keys and values get into an fp8 cache and out of it again."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_cache(x, cache, scale, SCALED: tl.constexpr):
    """x as the cache's type has it, over its scale if SCALED: fp8, cut to what that can hold."""
    wide = x
    if SCALED:
        # The exact division: the approximate one need not know that a power of two has an exact inverse.
        wide = x.to(tl.float32) * tl.div_rn(1.0, scale)
    return wide.to(cache.dtype.element_ty)


@triton.jit
def head_scales(scales, head, count, SCALED: tl.constexpr):
    """Scales of the keys and the values of heads: (2, count) float32 in memory. Not SCALED: 1."""
    keys, values = 1.0, 1.0
    if SCALED:
        keys = tl.load(scales + head, mask=head < count, other=1.0)
        values = tl.load(scales + count + head, mask=head < count, other=1.0)
    return keys, values


@triton.jit
def power_below(largest):
    """The power of two at or below each number that is not negative, but no tiny one."""
    exponent = tl.maximum(largest, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000
    return exponent.to(tl.float32, bitcast=True)


@triton.jit
def row_sizes(queries):
    """(rows,) float32 powers of two over which each row of queries is below 2."""
    return power_below(tl.max(tl.abs(queries.to(tl.float32)), 1))


@triton.jit
def as_float16(queries, sizes):
    """(rows, width) over their rows' sizes. e4m3 becomes float16 in one instruction, and bfloat16 in four, and beside
    numbers below 2 what float16 cuts off is nothing."""
    return (queries.to(tl.float32) * tl.div_rn(1.0, sizes)[:, None]).to(tl.float16)
