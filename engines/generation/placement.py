"""Where a model runs and in which numbers: the ``auto`` values of a spec end here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.gpu_peaks import PEAKS
from engines.protocol import EngineLoadError, EngineSpec, Gpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES = DTYPES | {"fp8": torch.float8_e4m3fn}
OLDEST_FP8 = (8, 9)
"""Compute capability of the first GPUs that convert to and from fp8 (Ada Lovelace)."""


@dataclass(frozen=True, slots=True)
class Placement:
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype


def choose_placement(spec: EngineSpec, stored_dtype: str) -> Placement:
    """Resolve device and dtypes; ``stored_dtype`` is the manifest's.

    ``auto`` takes CUDA where there is one; float32 on the CPU, where a text then depends on its request alone, and
    the stored 16-bit format on a GPU (bfloat16 for stored float32). Raises EngineLoadError.
    """
    device = _device(spec)
    if spec.dtype == "auto":
        dtype = torch.float32
        if device.type != "cpu":
            dtype = torch.float16 if stored_dtype == "float16" else torch.bfloat16
    else:
        dtype = _dtype(spec, "dtype", spec.dtype, device)
    kv_dtype = dtype if spec.kv_dtype == "auto" else _dtype(spec, "kv-dtype", spec.kv_dtype, device)
    if kv_dtype is KV_DTYPES["fp8"] and device.type == "cuda":
        require_fp8(spec.name, torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    return Placement(device, dtype, kv_dtype)


def require_fp8(name: str, gpu: str, capability: tuple[int, int]) -> None:
    """Raises EngineLoadError if a GPU of this compute capability has no fp8."""
    if capability < OLDEST_FP8:
        raise EngineLoadError(
            f"{name}: --kv-dtype fp8 needs a GPU of compute capability {'.'.join(map(str, OLDEST_FP8))} or newer, and "
            f"{gpu} has {'.'.join(map(str, capability))}; use --kv-dtype auto"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """The name under which users know it."""
    return next(name for name, known in KV_DTYPES.items() if known is dtype)


def _device(spec: EngineSpec) -> torch.device:
    if spec.device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
    try:
        device = torch.device(spec.device)
    except RuntimeError as error:
        raise EngineLoadError(f"{spec.name}: unknown device {spec.device!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        return _cuda_device(spec, device)
    if device.type != "cpu":
        raise EngineLoadError(f"{spec.name}: device {spec.device!r} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def _cuda_device(spec: EngineSpec, device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        raise EngineLoadError(
            f"{spec.name}: this PyTorch ({torch.__version__}) finds no CUDA device; use --device cpu, "
            "or install a CUDA build and a driver"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise EngineLoadError(f"{spec.name}: there is no {spec.device}; this machine has {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def _dtype(spec: EngineSpec, option: str, name: str, device: torch.device) -> torch.dtype:
    known = KV_DTYPES if option == "kv-dtype" else DTYPES
    dtype = known.get(name)
    if dtype is None:
        raise EngineLoadError(f"{spec.name}: unknown --{option} {name!r}; use auto, {', '.join(known)}")
    if dtype is torch.float16 and device.type == "cpu":
        raise EngineLoadError(f"{spec.name}: --{option} float16 is slow and inexact on a CPU; use float32 or bfloat16")
    return dtype


def describe_gpu(placement: Placement) -> Gpu:
    """For the metrics; ``placement`` is on a GPU."""
    properties = torch.cuda.get_device_properties(placement.device)
    peak = PEAKS.get(properties.name)
    half = placement.dtype in (torch.bfloat16, torch.float16)
    return Gpu(
        name=properties.name,
        uuid=f"GPU-{properties.uuid}",
        peak_flops=peak.flops if peak is not None and half else None,
        peak_bytes=None if peak is None else peak.bytes,
    )
