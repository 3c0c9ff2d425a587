"""GPUs that models are on, once a second, into the metrics."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from engines.protocol import EngineInfo, Gpu
from server.metric_families import Families
from server.nvml import GpuSample, NvmlGpu, NvmlMissing

INTERVAL = 1.0
"""Seconds between two samples."""
log = logging.getLogger(__name__)

GPU_GAUGES = {
    "utilization": "gpu_utilization_ratio",
    "sm_active": "gpu_sm_active_ratio",
    "memory_bandwidth": "gpu_memory_bandwidth_ratio",
    "memory_used": "gpu_memory_used_bytes",
    "memory_total": "gpu_memory_total_bytes",
    "power": "gpu_power_watts",
    "temperature": "gpu_temperature_celsius",
}
"""Fields of GpuSample, and the metrics that show them."""


class Source(Protocol):
    """What can be asked about a GPU."""

    driver: str

    def sample(self) -> GpuSample:
        """What it does now."""


class GpuMetrics:
    """``watch`` what a worker says that it computes on; ``run`` until cancelled. A GPU that nothing can be read of
    has no series, and the log says so once."""

    def __init__(self, families: Families, find: Callable[[str], Source] = NvmlGpu) -> None:
        """``find`` takes a uuid and raises NvmlMissing."""
        self._families = families
        self._find = find
        self._seen: set[str] = set()
        self._new: list[tuple[str, Gpu]] = []
        self._sources: dict[str, Source] = {}
        self._energy: dict[str, float] = {}
        # NVML's calls wait for the driver: neither the loop nor the tokenizers may.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nvml")

    def watch(self, info: EngineInfo) -> None:
        """Does nothing for a model on the CPU, and for a GPU that is watched already."""
        if info.gpu is not None and info.device not in self._seen:
            self._seen.add(info.device)
            self._new.append((info.device, info.gpu))

    async def run(self) -> None:
        """Sample for ever."""
        while True:
            await self.sample()
            await asyncio.sleep(INTERVAL)

    async def sample(self) -> None:
        """Each GPU once."""
        loop = asyncio.get_running_loop()
        while self._new:
            await self._open(*self._new.pop())
        for name, source in self._sources.items():
            self.show(name, await loop.run_in_executor(self._thread, source.sample))

    async def _open(self, name: str, gpu: Gpu) -> None:
        loop = asyncio.get_running_loop()
        try:
            source = await loop.run_in_executor(self._thread, self._find, gpu.uuid)
        except NvmlMissing as missing:
            log.warning("there are no metrics of %s (%s): %s", name, gpu.name, missing)
            return
        self._families.gauges["gpu_info"].labels(name, gpu.name, gpu.uuid, source.driver).set(1)
        self._sources[name] = source

    def show(self, name: str, sample: GpuSample) -> None:
        """What the sample does not tell has no series from here on."""
        for field, metric in GPU_GAUGES.items():
            value = getattr(sample, field)
            if value is not None:
                self._families.gauges[metric].labels(name).set(value)
            else:
                with contextlib.suppress(KeyError):
                    self._families.gauges[metric].remove(name)
        if sample.energy is not None:
            before = self._energy.get(name, sample.energy)
            self._families.counters["gpu_energy_joules"].labels(name).inc(max(0.0, sample.energy - before))
            self._energy[name] = sample.energy

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
