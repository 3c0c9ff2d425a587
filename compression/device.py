"""What a model is compressed on."""

from __future__ import annotations

import torch

from compression.errors import CompressionError


def use_threads(threads: int | None) -> None:
    """Compute on so many threads of the CPU; None: on as many as torch chooses."""
    if threads is not None:
        torch.set_num_threads(threads)


def choose_device(wanted: str) -> str:
    """``auto``: the GPU where there is one. Raises CompressionError for a device that is not there."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise CompressionError(f"unknown device {wanted[:40]!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise CompressionError(f"this PyTorch ({torch.__version__}) does not find {wanted}; use --device cpu")
    return wanted
