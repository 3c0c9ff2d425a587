"""How many KV blocks fit: weights first, then the measured workspace of the largest step, then KV takes what is free.

Nothing grows after load but by the caches of torch's allocators, which the measured step has filled already.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from engines.models.memory import free_bytes
from engines.protocol import EngineLoadError

GPU_SHARE = 0.9
"""Share of a GPU's memory that may be in use when everything is laid out."""

CPU_SHARE = 0.4
"""Share of what the container's limit leaves beside the weights that KV takes on the CPU."""

SHORTEST_MODEL_LEN = 64
"""A shorter context than this is no use to anyone; the load fails instead."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KvSize:
    blocks: int
    max_model_len: int


def kv_bytes(device: torch.device, memory_limit: int | None, weights: int, workspace: int) -> int:
    """Bytes for KV once the weights are loaded. May be negative where they do not even leave the workspace."""
    if device.type == "cpu":
        if memory_limit is None:
            return int(CPU_SHARE * free_bytes(device))
        return min(memory_limit - weights, free_bytes(device)) - workspace
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    most = free - workspace - int((1 - GPU_SHARE) * total)
    return most if memory_limit is None else min(memory_limit - weights - workspace, free - workspace)


def size_kv(
    name: str, available: int, block_bytes: int, block_size: int, max_rows: int, model_len: int, asked: int | None
) -> KvSize:
    """Blocks that fit in ``available`` bytes, at most what ``max_rows`` sequences of ``model_len`` tokens need.

    ``asked`` is the length that the user wants. Where not even one sequence fits, a length that nobody asked for is
    cut to what fits, and the log says so; else EngineLoadError.
    """
    needed = -(-model_len // block_size)
    blocks = min(max(0, available) // block_bytes, max_rows * needed)
    if blocks >= needed:
        return KvSize(blocks, model_len)
    fits = blocks * block_size
    if asked is None and fits >= SHORTEST_MODEL_LEN:
        _log.warning("%s: KV memory holds %d tokens; max-model-len is cut from %d to that", name, fits, model_len)
        return KvSize(blocks, fits)
    raise EngineLoadError(
        f"{name}: a sequence of {model_len} tokens needs {needed * block_bytes >> 20} MiB of KV memory, and "
        f"{max(0, available) >> 20} MiB are left beside the weights ({fits} tokens); "
        "set a smaller --max-model-len, a larger --memory-limit or a 16-bit --dtype"
    )


def measure_workspace(device: torch.device, step: Callable[[], object]) -> int:
    """Bytes that ``step`` takes at its peak beyond what was in use before."""
    if device.type == "cpu":
        before = _reset_peak()
        step()
        return max(0, _status_bytes("VmHWM:") - before)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_reserved(device) - before)


def _reset_peak() -> int:
    """Set the kernel's record of our peak to what is resident now, where it lets us; give the peak."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        _log.debug("the kernel does not let a process reset its peak memory")
    return _status_bytes("VmHWM:")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    return psutil.Process().memory_info().rss
