"""Norms, gating, rope and cache writes: each one pass over its tensors, in float32 inside, rounded as the reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engines.kernels.cuda.fp8 import head_scales, to_cache
from engines.kernels.cuda.launch import Launcher

SILU_BLOCK = 1024
WARP_NUMBERS = 512
"""Of a row, for each warp where a program takes whole rows."""


@triton.jit
def _norm_kernel(
    x,
    weight,
    normed,
    inner,
    outer_stride,
    inner_stride,
    width,
    eps,
    BLOCK: tl.constexpr,
):
    """Grid (rows,): row r is x[r // inner, r % inner]; the result is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    mask = dims < width
    values = tl.load(x + (row // inner) * outer_stride + (row % inner) * inner_stride + dims, mask=mask, other=0.0)
    # Before the sum, whose barrier it would else wait for.
    gain = tl.load(weight + dims, mask=mask, other=0.0).to(tl.float32)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    tl.store(normed + row * width + dims, (wide * scale * gain).to(normed.dtype.element_ty), mask=mask)


@triton.jit
def _silu_mul_kernel(gate_up, output, stride, width, BLOCK: tl.constexpr):
    """Grid (rows, parts of the width)."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = dims < width
    gate = tl.load(gate_up + row * stride + dims, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + dims, mask=mask, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(output + row * width + dims, gated.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _turned(source, distance, mask, cos, sin):
    """The pairs at ``source`` and ``source + distance``, turned, in float32."""
    left = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(source + distance, mask=mask, other=0.0).to(tl.float32)
    return left * cos[None, :] - right * sin[None, :], right * cos[None, :] + left * sin[None, :]


@triton.jit
def _rope_kernel(
    queries,
    keys,
    values,
    positions,
    cos_sin,
    key_cache,
    value_cache,
    scales,
    cache_slots,
    query_count,
    key_count,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    WRITE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Grid (tokens,). Keys are rotated in place, or with WRITE into their cache slot, beside their values."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    pair = tl.arange(0, HALF_BLOCK)
    angles = cos_sin + position * (2 * HALF) + pair
    cos = tl.load(angles, mask=pair < HALF, other=0.0)
    sin = tl.load(angles + HALF, mask=pair < HALF, other=0.0)
    place = 2 * pair if INTERLEAVED else pair
    distance = 1 if INTERLEAVED else HALF

    head = tl.arange(0, QUERY_HEADS)
    mask = (head < query_count)[:, None] & (pair < HALF)[None, :]
    source = queries + token * query_token_stride + head[:, None] * query_head_stride + place[None, :]
    first, second = _turned(source, distance, mask, cos, sin)
    tl.store(source, first.to(queries.dtype.element_ty), mask=mask)
    tl.store(source + distance, second.to(queries.dtype.element_ty), mask=mask)

    head = tl.arange(0, KEY_HEADS)
    mask = (head < key_count)[:, None] & (pair < HALF)[None, :]
    key = keys + token * key_token_stride + head[:, None] * key_head_stride
    source = key + place[None, :]
    first, second = _turned(source, distance, mask, cos, sin)
    first, second = first.to(keys.dtype.element_ty), second.to(keys.dtype.element_ty)
    if WRITE:
        slot = tl.load(cache_slots + token)
        mask = mask & (slot >= 0)
        entry = (slot * key_count + head[:, None]) * WIDTH
        target = key_cache + entry + place[None, :]
        key_scale, value_scale = head_scales(scales, head[:, None], key_count, SCALED)
        tl.store(target, to_cache(first, key_cache, key_scale, SCALED), mask=mask)
        tl.store(target + distance, to_cache(second, key_cache, key_scale, SCALED), mask=mask)
        dims = tl.arange(0, WIDTH_BLOCK)[None, :]
        whole = (head < key_count)[:, None] & (dims < WIDTH) & (slot >= 0)
        if WIDTH > 2 * HALF:
            unturned = whole & (dims >= 2 * HALF)
            kept = tl.load(key + dims, mask=unturned, other=0.0)
            tl.store(key_cache + entry + dims, to_cache(kept, key_cache, key_scale, SCALED), mask=unturned)
        value = values + token * value_token_stride + head[:, None] * value_head_stride + dims
        copied = tl.load(value, mask=whole, other=0.0)
        tl.store(value_cache + entry + dims, to_cache(copied, value_cache, value_scale, SCALED), mask=whole)
    else:
        tl.store(source, first, mask=mask)
        tl.store(source + distance, second, mask=mask)


@triton.jit
def _write_kernel(
    entries,
    cache,
    cache_slots,
    count,
    token_stride,
    head_stride,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    """Grid (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(cache_slots + token)
    head, dims = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH_BLOCK)[None, :]
    mask = (head < count) & (dims < WIDTH) & (slot >= 0)
    entry = tl.load(entries + token * token_stride + head * head_stride + dims, mask=mask, other=0.0)
    tl.store(cache + (slot * count + head) * WIDTH + dims, entry.to(cache.dtype.element_ty), mask=mask)


_norm = Launcher(_norm_kernel)
_silu_mul = Launcher(_silu_mul_kernel)
_rope = Launcher(_rope_kernel)
_write = Launcher(_write_kernel)


def row_warps(block: int) -> int:
    """Of a program that takes a row of so many numbers."""
    return min(max(block // WARP_NUMBERS, 1), 16)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, warps: int | None = None) -> torch.Tensor:
    """x is (T, width) or (T, heads, width) with a contiguous last dimension."""
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = x.shape[-1]
    inner, inner_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
    block = triton.next_power_of_2(width)
    _norm(
        (x.shape[0] * inner, 1, 1),
        (x, weight, normed),
        fixed=(inner, x.stride(0), inner_stride, width),
        free=(eps,),
        constants=(block,),
        warps=warps or row_warps(block),
    )
    return normed


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """(T, 2I) -> (T, I)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    output = gate_up.new_empty(rows, width)
    parts = -(-width // SILU_BLOCK)
    _silu_mul((rows, parts, 1), (gate_up, output), fixed=(gate_up.stride(0), width), free=(), constants=(SILU_BLOCK,))
    return output


def rope_(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool
) -> None:
    """In place, queries and keys of one type."""
    _launch_rope(queries, keys, keys, positions, cos_sin, interleaved, (keys, keys), positions, write=False)


def rope_write_kv(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool,
    cache: tuple[torch.Tensor, ...],
    cache_slots: torch.Tensor,
) -> None:
    """Rotate queries in place, write rotated keys and values into their slots. Keys and values have one shape."""
    _launch_rope(queries, keys, values, positions, cos_sin, interleaved, cache, cache_slots, write=True)


def _launch_rope(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool,
    cache: tuple[torch.Tensor, ...],
    cache_slots: torch.Tensor,
    write: bool,
) -> None:
    half, width = cos_sin.shape[1] // 2, keys.shape[2]
    scaled = len(cache) > 2
    _rope(
        (queries.shape[0], 1, 1),
        (queries, keys, values, positions, cos_sin, *cache[:2], cache[2] if scaled else cos_sin, cache_slots),
        fixed=(
            queries.shape[1],
            keys.shape[1],
            *queries.stride()[:2],
            *keys.stride()[:2],
            *values.stride()[:2],
        ),
        free=(),
        constants=(
            interleaved,
            half,
            triton.next_power_of_2(half),
            triton.next_power_of_2(queries.shape[1]),
            triton.next_power_of_2(keys.shape[1]),
            write,
            width,
            triton.next_power_of_2(width),
            scaled,
        ),
    )


def write_cache(entries: torch.Tensor, cache: torch.Tensor, cache_slots: torch.Tensor) -> None:
    """(T, heads, width) or (T, width) entries into a contiguous (blocks, block_size, ...) cache."""
    heads, head_stride = (entries.shape[1], entries.stride(1)) if entries.dim() == 3 else (1, 0)
    width = entries.shape[-1]
    _write(
        (entries.shape[0], 1, 1),
        (entries, cache, cache_slots),
        fixed=(heads, entries.stride(0), head_stride),
        free=(),
        constants=(width, triton.next_power_of_2(heads), triton.next_power_of_2(width)),
    )
