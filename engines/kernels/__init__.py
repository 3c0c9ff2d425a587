"""The operations that models and the sampler call: one signature each, the fastest implementation that fits.

The native C library serves CPU tensors in float32 and bfloat16 where it was built, Triton kernels serve CUDA tensors
where Triton is installed; everything else runs ``reference``. In float32 on the CPU a row's result is the same bits
whatever other rows are in the step.
Shapes: T flat tokens of a step, Hq query heads, Hk key/value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from engines.kernels import reference
from engines.kernels.cuda import TritonKernels, TritonStatus, shared_triton, triton_status
from engines.kernels.native import NativeStatus, native_status, shared_native
from engines.kernels.native.library import TYPE_CODES
from engines.kernels.reference import AttentionBatch

__all__ = [
    "AttentionBatch",
    "NativeStatus",
    "PackedLinear",
    "TritonStatus",
    "add_rms_norm",
    "draw_tokens",
    "gumbel_noise",
    "linear",
    "mla_attention",
    "native_status",
    "pack_linear",
    "paged_attention",
    "rms_norm",
    "rope_",
    "rope_write_kv",
    "silu_mul",
    "triton_status",
    "write_kv",
    "write_latent",
]


_native = shared_native()
_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)
INVARIANT_ROWS = 8
"""Without the library, float32 products on the CPU run on a multiple of so many rows: below it BLAS picks another
kernel, and a row's last bits, by the number of rows."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight in the layout that ``linear`` reads."""

    weight: torch.Tensor
    layout: Literal["plain", "turned", "panels", "onednn"]
    """(out, in) as it is, its transposed view, the native library's panels, or oneDNN's own blocks."""
    out_features: int
    in_features: int


def pack_linear(weight: torch.Tensor) -> PackedLinear:
    """(out, in) weight -> what ``linear`` takes; the caller may drop the plain weight."""
    out_features, in_features = weight.shape
    if _native is not None and weight.is_cpu and weight.dtype is torch.float32:
        return PackedLinear(_native.pack_panels(weight.contiguous()), "panels", out_features, in_features)
    if weight.is_cpu and weight.dtype is torch.bfloat16 and _has_onednn_bfloat16():
        blocks = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        return PackedLinear(blocks, "onednn", out_features, in_features)
    if weight.is_cuda:
        return PackedLinear(weight.t(), "turned", out_features, in_features)
    return PackedLinear(weight, "plain", out_features, in_features)


def _has_onednn_bfloat16() -> bool:
    """Whether torch can lay out weights for oneDNN once; by itself it does so again in every product."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(T, in) -> (T, out)."""
    if packed.layout == "turned":
        # Less work for the host than ``functional.linear``, which turns the weight in every call.
        return x.mm(packed.weight) if bias is None else torch.addmm(bias, x, packed.weight)
    if packed.layout == "panels" and _native is not None:
        return _native.linear(x if x.stride(1) == 1 else x.contiguous(), packed.weight, packed.out_features, bias)
    if packed.layout == "onednn":
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed.weight, bias, "none", [], "")
        return result
    missing = -x.shape[0] % INVARIANT_ROWS
    if missing and x.is_cpu and x.dtype is torch.float32:
        padded = functional.linear(functional.pad(x, (0, 0, 0, missing)), packed.weight, bias)
        return padded[: x.shape[0]]
    return functional.linear(x, packed.weight, bias)


def _fits_native(*tensors: torch.Tensor) -> bool:
    """Whether all lie on the CPU in one type that the library knows, with a contiguous last dimension."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype is not dtype or tensor.stride(-1) != 1:
            return False
    return dtype in TYPE_CODES


def _triton_for(*tensors: torch.Tensor) -> TritonKernels | None:
    """The Triton kernels, if all lie on a GPU in types that they know, with a contiguous last dimension."""
    for tensor in tensors:
        if not tensor.is_cuda or tensor.dtype not in _TRITON_TYPES or tensor.stride(-1) != 1:
            return None
    return shared_triton()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last dimension of (T, D) or (T, H, D), in float32, rounded once to x's dtype."""
    if _native is not None and x.dim() in (2, 3) and _fits_native(x, weight):
        return _native.rms_norm(x, weight, eps)
    if x.dim() in (2, 3) and (triton := _triton_for(x, weight)) is not None:
        return triton.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + residual`` of (T, D) and its rms norm: (normed, new residual). The inputs stay as they are."""
    if _native is not None and x.dim() == 2 and residual.is_contiguous() and _fits_native(x, residual, weight):
        return _native.add_rms_norm(x, residual, weight, eps)
    if x.dim() == 2 and residual.is_contiguous() and (triton := _triton_for(x, residual, weight)) is not None:
        return triton.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """(T, 2I) -> (T, I): ``silu(gate) * up`` with the gate in the first half."""
    if _native is not None and gate_up.dim() == 2 and _fits_native(gate_up):
        return _native.silu_mul(gate_up)
    if gate_up.dim() == 2 and (triton := _triton_for(gate_up)) is not None:
        return triton.silu_mul(gate_up)
    return reference.silu_mul(gate_up)


def rope_(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool
) -> None:
    """Rotate the first ``rope_dim`` dimensions of (T, Hq, D) and (T, Hk, D) in place.

    ``cos_sin`` is contiguous (max_pos, rope_dim) float32: cosines in the first half, sines in the second. Pairs are
    (i, i + rope_dim/2), or (2i, 2i+1) where ``interleaved``.
    """
    if _native is not None and _fits_native(queries, keys):
        _native.rope_(queries, keys, positions, cos_sin, interleaved)
    elif (triton := _triton_for(queries, keys)) is not None:
        triton.rope_(queries, keys, positions, cos_sin, interleaved)
    else:
        reference.rope_(queries, keys, positions, cos_sin, interleaved)


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
    """``rope_``, then ``write_kv`` of the rotated keys. Queries are rotated in place; ``keys`` may stay as they are."""
    same_shape = keys.shape == values.shape and cache[0].shape == cache[1].shape
    if same_shape and (triton := _triton_for(queries, keys, values, *cache)) is not None:
        pair = cache[0], cache[1]
        triton.rope_write_kv(queries, keys, values, positions, cos_sin, interleaved, pair, cache_slots)
        return
    rope_(queries, keys, positions, cos_sin, interleaved)
    write_kv(keys, values, cache, cache_slots)


def write_kv(
    keys: torch.Tensor, values: torch.Tensor, cache: tuple[torch.Tensor, ...], cache_slots: torch.Tensor
) -> None:
    """Write (T, Hk, D) keys and values into the (blocks, block_size, Hk, D) caches at (T,) slots."""
    _write_cache(keys, cache[0], cache_slots)
    _write_cache(values, cache[1], cache_slots)


def write_latent(latent: torch.Tensor, cache: tuple[torch.Tensor, ...], cache_slots: torch.Tensor) -> None:
    """Write (T, C) latents into the (blocks, block_size, C) cache at (T,) slots."""
    _write_cache(latent, cache[0], cache_slots)


def _write_cache(entries: torch.Tensor, cache: torch.Tensor, cache_slots: torch.Tensor) -> None:
    if _native is not None and _fits_native(entries) and cache.dtype in TYPE_CODES:
        _native.write_cache(entries, cache, cache_slots)
    elif (triton := _triton_for(entries, cache)) is not None:
        triton.write_cache(entries, cache, cache_slots)
    else:
        reference.write_cache(entries, cache, cache_slots)


def paged_attention(
    queries: torch.Tensor, cache: tuple[torch.Tensor, ...], batch: AttentionBatch, scale: float
) -> torch.Tensor:
    """Causal attention of (T, Hq, D) queries over a paged cache, this step's keys and values already written.

    The query at position p attends to positions 0 .. p of its row.
    """
    keys, values = cache
    return _attention(queries, keys, values, batch, scale)


def mla_attention(
    queries: torch.Tensor, cache: tuple[torch.Tensor, ...], batch: AttentionBatch, scale: float, value_width: int
) -> torch.Tensor:
    """Absorbed MLA: (T, H, C) queries over (blocks, block_size, C) latents -> (T, H, value_width).

    All heads share one key, the whole latent, and one value, its first ``value_width`` entries.
    """
    latents = cache[0].unsqueeze(2)
    return _attention(queries, latents, latents[..., :value_width], batch, scale)


def _attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: AttentionBatch, scale: float
) -> torch.Tensor:
    if _native is not None and _fits_native(queries) and keys.dtype in TYPE_CODES:
        return _native.attention(queries, keys, values, batch, scale)
    if queries.is_cpu:
        return reference.attention(queries, keys, values, batch, scale)
    triton = _triton_for(queries, keys, values)
    if triton is not None and triton.fits_attention(keys, values):
        return triton.attention(queries, keys, values, batch, scale)
    return reference.padded_attention(queries, keys, values, batch, scale)


def gumbel_noise(seeds: torch.Tensor, choices: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """(R,) int64 seeds, choices and output positions -> (R, vocab) float32 noise; the same on every backend."""
    if _native is not None and seeds.is_cpu:
        return _native.gumbel_noise(seeds.contiguous(), choices.contiguous(), positions.contiguous(), vocab)
    if seeds.is_cuda and (triton := shared_triton()) is not None:
        return triton.gumbel_noise(seeds, choices, positions, vocab)
    return reference.gumbel_noise(seeds, choices, positions, vocab)


def draw_tokens(
    logits: torch.Tensor,
    first: int,
    temperature: torch.Tensor,
    truncation: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    noise: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor | None:
    """Rows ``first`` .. S-1 of (S, V) float32 logits drawn by one kernel: (S - first,) int64 ids.

    ``truncation`` is (S,) float32 top_p (1 keeps all) and min_p and int64 top_k (0 keeps all), ``noise`` (S,) int64
    seeds, choices and positions; a row draws as ``engines.generation.sampler`` says. None where no kernel does this.
    """
    triton = _triton_for(logits)
    return None if triton is None else triton.draw_tokens(logits, first, temperature, truncation, noise)
