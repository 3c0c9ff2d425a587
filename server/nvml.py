"""What NVIDIA's management library tells of a GPU. Whatever it does not tell is None; nothing is made up.

Utilisation by NVML means that some kernel ran, however small. How much of the GPU was busy comes from its performance
monitor (GPM), which drivers offer from Hopper on.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class NvmlMissing(Exception):
    """There is no library to ask, or it does not know the GPU. The text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """Shares are 0 to 1."""

    utilization: float | None = None
    sm_active: float | None = None
    memory_bandwidth: float | None = None
    memory_used: float | None = None
    memory_total: float | None = None
    """Bytes, like ``memory_used``."""
    power: float | None = None
    """Watts."""
    energy: float | None = None
    """Joules since the driver was loaded."""
    temperature: float | None = None
    """Degrees Celsius."""


class NvmlGpu:
    """One GPU. Calls may take milliseconds: not for an event loop."""

    def __init__(self, uuid: str) -> None:
        """Raises NvmlMissing."""
        if importlib.util.find_spec("pynvml") is None:
            raise NvmlMissing("the package nvidia-ml-py is missing; pip install 'slimserve[gpu]' brings it")
        self._nvml: Any = importlib.import_module("pynvml")
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
            self.driver = str(self._nvml.nvmlSystemGetDriverVersion())
        except self._nvml.NVMLError as error:
            raise NvmlMissing(f"NVML says: {error}") from None
        self._former: Any = self._take_gpm() if self._has_gpm() else None

    def sample(self) -> GpuSample:
        """Shares by GPM are of the time since the call before."""
        nvml, handle = self._nvml, self._handle
        memory = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        used, total = (None, None) if memory is None else (float(memory.used), float(memory.total))
        sm_active, bandwidth = self._gpm_shares()
        return GpuSample(
            utilization=_scaled(self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu), 0.01),
            sm_active=sm_active,
            memory_bandwidth=bandwidth,
            memory_used=used,
            memory_total=total,
            power=_scaled(self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle)), 0.001),
            energy=_scaled(self._ask(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle)), 0.001),
            temperature=_scaled(
                self._ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)), 1.0
            ),
        )

    def _ask(self, question: Callable[[], Any]) -> Any:
        """None where this GPU or driver does not tell."""
        try:
            return question()
        except self._nvml.NVMLError:
            return None

    def _has_gpm(self) -> bool:
        support = self._ask(lambda: self._nvml.nvmlGpmQueryDeviceSupport(self._handle))
        return support is not None and bool(support.isSupportedDevice)

    def _take_gpm(self) -> Any:
        sample = self._ask(self._nvml.nvmlGpmSampleAlloc)
        if sample is None or self._ask(lambda: self._nvml.nvmlGpmSampleGet(self._handle, sample)) is None:
            return None
        return sample

    def _gpm_shares(self) -> tuple[float | None, float | None]:
        """Of busy multiprocessors, and of the memory's bandwidth."""
        nvml = self._nvml
        if self._former is None or (later := self._take_gpm()) is None:
            return None, None
        question = nvml.c_nvmlGpmMetricsGet_t()
        question.version, question.numMetrics = nvml.NVML_GPM_METRICS_GET_VERSION, 2
        question.sample1, question.sample2 = self._former, later
        question.metrics[0].metricId = nvml.NVML_GPM_METRIC_SM_UTIL
        question.metrics[1].metricId = nvml.NVML_GPM_METRIC_DRAM_BW_UTIL
        answer = self._ask(lambda: nvml.nvmlGpmMetricsGet(question))
        self._ask(lambda: nvml.nvmlGpmSampleFree(self._former))
        self._former = later
        if answer is None:
            return None, None
        shares = [each.value / 100 if each.nvmlReturn == nvml.NVML_SUCCESS else None for each in answer.metrics[:2]]
        return shares[0], shares[1]


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else float(value) * factor
