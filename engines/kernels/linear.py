"""Linear layers with what stands directly before and after them: norm, bias, gating, residual.

``linear`` is one signature over every implementation: small batches on a GPU run one kernel that reads each weight
once, everything else is composed of a plain product and the elementwise kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from engines.kernels import backends, elementwise
from engines.kernels.cuda import TritonKernels
from engines.kernels.cuda.tuning import MOST_ROWS
from engines.kernels.packing import PackedLinear, PackedParts, PackedWeight
from engines.kernels.quantized import QuantizedLinear
from engines.kernels.quantized_gpu import GpuQuantized

INVARIANT_ROWS = 8
"""Without the library, float32 products on the CPU run on a multiple of so many rows: below it BLAS picks another
kernel, and a row's last bits, by the number of rows."""

SKINNY_TYPES = (torch.bfloat16, torch.float16)

NORM_APART_ROWS = 33
"""From so many rows, a norm in a kernel of its own takes less time than in the layer's, whose programs repeat it."""


@dataclass(frozen=True, slots=True)
class RmsNorm:
    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        return elementwise.rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class Fusion:
    """What is done to a linear layer's input and output in the same operation, in this order."""

    norm: RmsNorm | None = None
    """Of the input."""
    gated: bool = False
    """The output, (gate, up) side by side, becomes ``silu(gate) * up``: half as wide."""
    residual: torch.Tensor | None = None
    """Added to the output, whose shape it has."""
    dtype: torch.dtype | None = None
    """Of the output; None: the input's."""
    reuse: bool = False
    """The result may take the residual's memory: nobody reads the residual afterwards, and it is not the input."""
    into: torch.Tensor | None = None
    """Contiguous memory of the result's shape and type, where it has to go; None: wherever there is some."""


PLAIN = Fusion()


@dataclass(frozen=True, slots=True)
class Handover:
    """What the layer that writes the residual stream computes of the next layer's norm, while it has the values."""

    norm: RmsNorm
    """The one that this is a part of."""
    scaled: torch.Tensor
    """(T, D): the stream times the norm's gain, in the stream's type."""
    squares: torch.Tensor
    """(T, parts) float32, whose sums are the sums of each row's squares."""


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream between two layers."""

    hidden: torch.Tensor
    """(T, D)."""
    handover: Handover | None = None


def linear(
    x: torch.Tensor | Stream, packed: PackedWeight, bias: torch.Tensor | None = None, fusion: Fusion = PLAIN
) -> torch.Tensor:
    """(T, in) -> (T, out), or (T, out / 2) where ``fusion`` gates."""
    stream = x if isinstance(x, Stream) else Stream(x)
    output = _apply(stream, packed, bias, fusion)
    return output if fusion.into is None or output is fusion.into else fusion.into.copy_(output)


def add_linear(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, stream: Stream, next_norm: RmsNorm | None = None
) -> Stream:
    """``stream``, whose memory may be taken, plus the layer of the (T, in) x. Where ``next_norm`` is what reads the
    result next, as much of it is handed over as the kernel at hand can."""
    fusion = Fusion(residual=stream.hidden, reuse=True)
    if isinstance(packed, PackedLinear) and (added := _skinny(Stream(x), packed, bias, fusion, next_norm)) is not None:
        return added
    if isinstance(packed, GpuQuantized) and (summed := _codes(Stream(x), packed, bias, fusion, next_norm)) is not None:
        return summed
    return Stream(_composed(x, packed, bias, fusion))


def _apply(stream: Stream, packed: PackedWeight, bias: torch.Tensor | None, fusion: Fusion) -> torch.Tensor:
    """As ``linear``; ``fusion.into`` need not be heeded."""
    if isinstance(packed, PackedLinear) and (output := _skinny(stream, packed, bias, fusion)) is not None:
        return output.hidden
    if isinstance(packed, GpuQuantized) and (result := _codes(stream, packed, bias, fusion)) is not None:
        return result.hidden
    return _composed(stream.hidden, packed, bias, fusion)


def _composed(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, fusion: Fusion) -> torch.Tensor:
    """A plain product and the elementwise kernels around it, or a format's own kernel."""
    if isinstance(packed, PackedParts):
        return _side_by_side(x, packed, bias, fusion)
    if not isinstance(packed, PackedLinear):
        return _quantized(x, packed, bias, fusion)
    if fusion.norm is not None:
        x = fusion.norm(x)
    if packed.layout == "turned" and bias is None:
        if not fusion.gated:
            return _blas(x, packed.weight, fusion)
        if (output := _gated_together(x, packed.weight, fusion)) is not None:
            return output
    return compose_output(product(x, packed, bias), fusion)


def _blas(x: torch.Tensor, weight: torch.Tensor, fusion: Fusion) -> torch.Tensor:
    """A product with what cuBLAS does beside it: add to what is there, and give sums that are not rounded to x's
    type."""
    residual, dtype = fusion.residual, fusion.dtype
    if residual is not None:
        # Not in place, torch copies the residual first.
        output = residual.addmm_(x, weight) if fusion.reuse else torch.addmm(residual, x, weight)
    elif dtype is torch.float32 and x.is_cuda and x.dtype in SKINNY_TYPES:
        return torch.mm(x, weight, out_dtype=dtype, out=fusion.into)
    else:
        output = x.mm(weight)
    return output if dtype is None else output.to(dtype)


def _gated_together(x: torch.Tensor, weight: torch.Tensor, fusion: Fusion) -> torch.Tensor | None:
    """A gated product of many rows in one kernel; None where that does not fit or is slower."""
    if fusion.residual is not None or fusion.dtype not in (None, x.dtype):
        return None
    if x.dtype not in SKINNY_TYPES or x.dtype is not weight.dtype or not weight.t().is_contiguous():
        return None
    triton = backends.triton_for(x)
    return None if triton is None else triton.gated_linear(x, weight.t(), fusion.into)


def _quantized(x: torch.Tensor, packed: QuantizedLinear, bias: torch.Tensor | None, fusion: Fusion) -> torch.Tensor:
    output = packed.apply(x, bias, fusion)
    if output is not None:
        return output
    return compose_output(packed.product(x if fusion.norm is None else fusion.norm(x), bias), fusion)


def _side_by_side(x: torch.Tensor, packed: PackedParts, bias: torch.Tensor | None, fusion: Fusion) -> torch.Tensor:
    x = x if fusion.norm is None else fusion.norm(x)
    outputs, start = [], 0
    for part in packed.parts:
        end = start + part.out_features
        outputs.append(linear(x, part, None if bias is None else bias[start:end]))
        start = end
    return compose_output(torch.cat(outputs, dim=1), fusion)


def compose_output(output: torch.Tensor, fusion: Fusion) -> torch.Tensor:
    """What ``fusion`` does to the output of a product, one operation after the other."""
    if fusion.gated:
        output = elementwise.silu_mul(output)
    if fusion.residual is not None:
        output = fusion.residual + output
    return output if fusion.dtype is None else output.to(fusion.dtype)


def _skinny(
    stream: Stream, packed: PackedLinear, bias: torch.Tensor | None, fusion: Fusion, next_norm: RmsNorm | None = None
) -> Stream | None:
    """``linear`` in one kernel, after one for the norm where it is apart; None where that does not fit or is slower."""
    x, norm, squares = stream.hidden, fusion.norm, None
    triton = _skinny_kernels(x, packed, fusion)
    if triton is None:
        return None
    place = _norm_place(stream, norm)
    rows, lines, depth = x.shape[0], packed.out_features, packed.in_features
    config = triton.skinny_config(rows, lines, depth, fusion.gated, place == "inside", x.device)
    if config is None:
        return None
    if norm is not None and place == "apart":
        x, norm = norm(x), None
    elif stream.handover is not None and place == "handed":
        x, squares = stream.handover.scaled, stream.handover.squares
    handover = None
    if next_norm is not None and x.dtype is torch.bfloat16 and (tiles := triton.handed_tiles(rows, lines, config)):
        handover = Handover(next_norm, x.new_empty(rows, lines), x.new_empty(rows, tiles, dtype=torch.float32))
    output = triton.skinny_linear(
        x,
        packed.weight.t(),
        config,
        None if norm is None else (norm.weight, norm.eps),
        bias,
        fusion.gated,
        fusion.residual,
        fusion.dtype,
        fusion.into,
        squares,
        handover,
    )
    return Stream(output, handover)


def _codes(
    stream: Stream, packed: GpuQuantized, bias: torch.Tensor | None, fusion: Fusion, next_norm: RmsNorm | None = None
) -> Stream | None:
    """``linear`` in one kernel on a quantized weight; None where that does not fit or is slower."""
    x, handed, handover = stream.hidden, stream.handover, None
    config = packed.config(x, fusion)
    if config is None:
        return None
    if handed is not None and not (packed.takes_handover and handed.norm is fusion.norm):
        handed = None
    if next_norm is not None and (tiles := packed.handed_tiles(x, config)):
        rows, lines = x.shape[0], packed.out_features
        handover = Handover(next_norm, x.new_empty(rows, lines), x.new_empty(rows, tiles, dtype=torch.float32))
    return Stream(packed.run(x, config, bias, fusion, handed, handover), handover)


def _skinny_kernels(x: torch.Tensor, packed: PackedLinear, fusion: Fusion) -> TritonKernels | None:
    """The kernels, if the one for few rows knows such tensors."""
    if packed.layout != "turned" or packed.weight.stride(1) != packed.in_features:
        return None
    if not 0 < x.shape[0] <= MOST_ROWS or x.dtype not in SKINNY_TYPES or x.dtype is not packed.weight.dtype:
        return None
    return backends.triton_for(x) if fusion.residual is None else backends.triton_for(x, fusion.residual)


def _norm_place(stream: Stream, norm: RmsNorm | None) -> Literal["nowhere", "handed", "apart", "inside"]:
    """Where the norm before a layer of few rows is computed."""
    if norm is None:
        return "nowhere"
    if stream.handover is not None and stream.handover.norm is norm:
        return "handed"
    # The kernel scales by the norm last; what it has before that can exceed float16.
    apart = stream.hidden.shape[0] >= NORM_APART_ROWS or stream.hidden.dtype is torch.float16
    return "apart" if apart else "inside"


def product(x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(T, in) -> (T, out)."""
    if packed.layout == "turned":
        # Less work for the host than ``functional.linear``, which turns the weight in every call.
        return x.mm(packed.weight) if bias is None else torch.addmm(bias, x, packed.weight)
    if packed.layout == "panels" and backends.native is not None:
        return backends.native.linear(
            x if x.stride(1) == 1 else x.contiguous(), packed.weight, packed.out_features, bias
        )
    if packed.layout == "onednn":
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed.weight, bias, "none", [], "")
        return result
    missing = -x.shape[0] % INVARIANT_ROWS
    if missing and x.is_cpu and x.dtype is torch.float32:
        padded = functional.linear(functional.pad(x, (0, 0, 0, missing)), packed.weight, bias)
        return padded[: x.shape[0]]
    return functional.linear(x, packed.weight, bias)
