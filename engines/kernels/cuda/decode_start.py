"""The new token of a row that decodes: its queries, key and value, normed, rotated and written to the cache."""

from __future__ import annotations

import triton
import triton.language as tl

from engines.kernels.cuda.fp8 import to_cache


@triton.jit
def _partners(dims, DIM: tl.constexpr, HALF: tl.constexpr):
    """The other dim of each dim's rotated pair; behind the pairs the dim itself."""
    partner = (dims + HALF) % (2 * HALF)
    if DIM > 2 * HALF:
        partner = tl.where(dims < 2 * HALF, partner, dims)
    return partner


@triton.jit
def _angles(cos_sin, position, dims, HALF: tl.constexpr):
    """Cosine and signed sine of each dim, so that it becomes ``itself * cos + partner * sin``."""
    angle = cos_sin + position.to(tl.int64) * (2 * HALF) + dims % HALF
    cos = tl.load(angle, mask=dims < 2 * HALF, other=1.0)
    sin = tl.load(angle + HALF, mask=dims < 2 * HALF, other=0.0)
    return cos, tl.where(dims < HALF, -sin, sin)


@triton.jit
def _turned(x, partner, gain, gain_partner, cos, sin, eps, DIM: tl.constexpr, NORM: tl.constexpr):
    """(heads, dims) and their partners: normed over the dims if NORM, rotated; rounded as often as one by one."""
    left, right = x.to(tl.float32), partner.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(left * left, 1) / DIM + eps)[:, None]
        left = (left * scale * gain.to(tl.float32)).to(x.dtype).to(tl.float32)
        right = (right * scale * gain_partner.to(tl.float32)).to(x.dtype).to(tl.float32)
    return (left * cos + right * sin).to(x.dtype)


@triton.jit
def _load_gain(gain, dims, partner, DIM: tl.constexpr, NORM: tl.constexpr):
    """A norm's gain for dims and partners; with no norm, what is never used."""
    if NORM:
        own = tl.load(gain + dims, mask=dims < DIM, other=0.0)
        other = tl.load(gain + partner, mask=dims < DIM, other=0.0)
    else:
        own, other = dims, dims
    return own, other


@triton.jit
def start_fused(
    queries,
    new,
    keys,
    values,
    cache_slot,
    cos_sin,
    query_gain,
    key_gain,
    position,
    head_stride,
    slot_stride,
    scale,
    key_scale,
    value_scale,
    eps,
    first,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    TILE_M: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Queries, and the running softmax over the row's new token where ``first``, else over none.

    The first split also writes the new key and value, and attends to them as they are then in the cache. All that
    comes from memory is asked for before any of it is used, and what is the same for all heads is loaded for each: so
    it lies where it is needed.
    """
    head = tl.arange(0, TILE_M)[:, None]
    dims = tl.broadcast_to(tl.arange(0, DIM_BLOCK)[None, :], (TILE_M, DIM_BLOCK))
    partner = _partners(dims, DIM, HALF)
    is_dim = dims < DIM
    mask, new_mask = (head < GROUP) & is_dim, is_dim & first
    own = queries + head * head_stride
    x = tl.load(own + dims, mask=mask, other=0.0)
    x_partner = tl.load(own + partner, mask=mask, other=0.0)
    key = tl.load(new + dims, mask=new_mask, other=0.0)
    key_partner = tl.load(new + partner, mask=new_mask, other=0.0)
    value = tl.load(new + KV_HEADS * head_stride + dims, mask=new_mask, other=0.0)
    slot = tl.load(cache_slot, mask=first, other=-1)
    cos, sin = _angles(cos_sin, position, dims, HALF)
    gain, gain_partner = _load_gain(query_gain, dims, partner, DIM, NORM)
    new_gain, new_gain_partner = _load_gain(key_gain, dims, partner, DIM, NORM)
    q = _turned(x, x_partner, gain, gain_partner, cos, sin, eps, DIM, NORM)
    best = tl.full((TILE_M,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_M,), tl.float32)
    sums = tl.zeros((TILE_M, DIM_BLOCK), tl.float32)
    if first:
        turned = _turned(key, key_partner, new_gain, new_gain_partner, cos, sin, eps, DIM, NORM)
        entry = slot * slot_stride + dims
        written = is_dim & (head == 0) & (slot >= 0)
        new_key, new_value = to_cache(turned, keys, key_scale, SCALED), to_cache(value, values, value_scale, SCALED)
        tl.store(keys + entry, new_key, mask=written)
        tl.store(values + entry, new_value, mask=written)
        best = tl.sum(q.to(tl.float32) * new_key.to(tl.float32), 1) * scale
        total += 1.0
        sums += new_value.to(tl.float32)
    return q, best, total, sums
