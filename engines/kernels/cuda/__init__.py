"""Triton kernels for tensors on an NVIDIA GPU, loaded when the first such tensor comes.

Functions here take CUDA tensors that ``engines.kernels`` has already found to fit; they check nothing. None waits for
the device, none depends on anything but the tensors' shapes and the batch's host numbers, and a row's result does
not depend on the other rows of the step.
"""

from __future__ import annotations

import functools
import logging
import subprocess
from dataclasses import dataclass

import torch

from engines.kernels.cuda.binary_cache import choose_folder
from engines.kernels.cuda.device import rehearsed

OLDEST_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16 matrix units."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TritonStatus:
    """Whether Triton kernels serve CUDA tensors, and why not."""

    version: str | None
    """Of Triton; None where it cannot be used."""
    reason: str
    """Empty, or why the kernels run in plain torch."""


class TritonKernels:
    """The kernels of this process."""

    def __init__(self) -> None:
        """Raises ImportError where Triton is not installed."""
        from engines.kernels.cuda import (
            attention,
            decode_attention,
            elementwise,
            embedding,
            gated,
            mixture,
            mla,
            mla_prefill,
            prefill_attention,
            quantized,
            quantized_experts,
            quantized_rows,
            sampling,
            skinny,
        )

        self.attention = attention.attention
        self.fits_attention = attention.fits
        self.fits_grouped = prefill_attention.fits
        self.grouped_attention = prefill_attention.paged_attention
        self.attend_decodes = decode_attention.attend_fused
        self.fits_latents = mla.fits
        self.attend_latents = mla.attend_latents
        self.attend_mixed_latents = mla.attend_mixed
        self.write_latents = mla.write_latents
        self.fits_prompts = mla_prefill.fits
        self.mixture = mixture.mixture
        self.sorted_mixture = mixture.sorted_mixture
        self.embed = embedding.embed
        self.gated_linear = gated.gated_linear
        self.rms_norm = elementwise.rms_norm
        self.silu_mul = elementwise.silu_mul
        self.rope_ = elementwise.rope_
        self.rope_write_kv = elementwise.rope_write_kv
        self.write_cache = elementwise.write_cache
        self.quantized_config = quantized.quantized_config
        self.quantized_linear = quantized.quantized_linear
        self.handed_quantized_tiles = quantized.handed_tiles
        self.dequantized_product = quantized.dequantized_product
        self.route = quantized_experts.route
        self.routed = quantized_experts.routed
        self.quantized_mixture = quantized_experts.quantized_mixture
        self.round_rows = quantized_rows.round_rows
        self.scale_sums = quantized_rows.scale_sums
        self.gumbel_noise = sampling.gumbel_noise
        self.reserve_skinny = skinny.reserve
        self.skinny_config = skinny.skinny_config
        self.handed_tiles = skinny.handed_tiles
        self.skinny_linear = skinny.skinny_linear


@functools.cache
def _shared() -> tuple[TritonKernels | None, TritonStatus]:
    if rehearsed():
        return TritonKernels(), TritonStatus(None, "nothing is launched in a rehearsal")
    if not torch.cuda.is_available():
        return None, TritonStatus(None, "there is no CUDA device")
    capability = torch.cuda.get_device_capability()
    try:
        if capability < OLDEST_CAPABILITY:
            raise ImportError(f"the GPU's compute capability {capability} is below {OLDEST_CAPABILITY}")
        import triton

        choose_folder(str(triton.__version__), torch.cuda.get_device_name(), capability)

        kernels = TritonKernels()
        # The first launch compiles: without a C compiler for its launcher, Triton fails only here.
        kernels.silu_mul(torch.zeros((1, 32), device="cuda"))
    except (ImportError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        logger.warning("GPU kernels run in plain torch, many times slower: %s", error)
        return None, TritonStatus(None, str(error))
    return kernels, TritonStatus(str(triton.__version__), "")


def shared_triton() -> TritonKernels | None:
    """The process's kernels, imported at the first call; None where they cannot be used."""
    return _shared()[0]


def triton_status() -> TritonStatus:
    """Which Triton serves CUDA tensors, or why none does."""
    return _shared()[1]
