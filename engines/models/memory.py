"""How much memory is left for a model, before any of it is taken."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from engines.protocol import EngineLoadError

_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
"""Limit, usage and statistics in versions 2 and 1."""


def free_bytes(device: torch.device, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that may still be allocated on the device; on the CPU bounded by what the container's limit leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    left = psutil.virtual_memory().available
    for limit, used, stat in _CGROUPS:
        try:
            most, in_use = int((cgroup / limit).read_text()), int((cgroup / used).read_text())
            left = min(left, most - in_use + _file_cache((cgroup / stat).read_text()))
        except (OSError, ValueError):
            continue  # not this version, or the limit reads "max"
    return max(0, left)


def _file_cache(statistics: str) -> int:
    """Bytes of file pages: they count as used, and the kernel drops them when memory is wanted."""
    lines = (line.split() for line in statistics.splitlines())
    return sum(int(value) for key, value in lines if key in ("active_file", "inactive_file"))


def require_memory(name: str, needed: int, dtype: torch.dtype, device: torch.device, limit: int | None) -> None:
    """Raises EngineLoadError with both numbers if ``needed`` bytes of weights do not fit; ``limit`` in bytes."""
    free = free_bytes(device)
    room = free if limit is None else min(limit, free)
    if needed <= room:
        return
    source = "the memory limit allows" if room == limit else "are free"
    raise EngineLoadError(
        f"{name}: the weights need {_gigabytes(needed)} as {str(dtype).removeprefix('torch.')}, and only "
        f"{_gigabytes(room)} {source}; use a 16-bit --dtype, a smaller model, or a machine with more memory"
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
