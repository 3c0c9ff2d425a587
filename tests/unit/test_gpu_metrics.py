"""NVML is not here, so its answers are set; its structures, constants and errors are the package's own."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from engines.protocol import EngineInfo, Gpu
from server.gpu_metrics import GpuMetrics
from server.metric_families import Families
from server.nvml import GpuSample, NvmlGpu, NvmlMissing
from tests.metrics_text import value

GPU = Gpu(name="NVIDIA H100 80GB HBM3", uuid="GPU-1")


def info(device: str = "cuda:0", gpu: Gpu | None = GPU) -> EngineInfo:
    return EngineInfo(
        name="m", fingerprint="f", device=device, dtype="bfloat16", kv_dtype="bfloat16", weight_bytes=1, kv_bytes=1,
        threads=1, load_seconds=1.0, vocab_size=8, gpu=gpu,
    )  # fmt: skip


class Answers:
    """Of a driver that knows one GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlDeviceGetHandleByUUID": "handle",
            "nvmlSystemGetDriverVersion": "580.1",
            "nvmlGpmQueryDeviceSupport": SimpleNamespace(isSupportedDevice=1),
            "nvmlGpmSampleGet": "sample",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=30, total=80),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97, memory=40),
            "nvmlDeviceGetPowerUsage": 650_500,
            "nvmlDeviceGetTotalEnergyConsumption": 7_000,
            "nvmlDeviceGetTemperature": 61,
        }
        self.samples = 0
        for name in self.values:
            monkeypatch.setattr(pynvml, name, self._answer(name))
        monkeypatch.setattr(pynvml, "nvmlGpmSampleAlloc", self._alloc)
        monkeypatch.setattr(pynvml, "nvmlGpmSampleFree", self._free)
        monkeypatch.setattr(pynvml, "nvmlGpmMetricsGet", self._gpm)

    def _answer(self, name: str) -> Any:
        def answer(*_: object) -> Any:
            value = self.values[name]
            if isinstance(value, Exception):
                raise value
            return value

        return answer

    def _alloc(self) -> Any:
        self.samples += 1
        return pynvml.c_nvmlGpmSample_t()

    def _free(self, _: object) -> None:
        self.samples -= 1

    def _gpm(self, question: Any) -> Any:
        for metric in question.metrics[: question.numMetrics]:
            metric.value = {pynvml.NVML_GPM_METRIC_SM_UTIL: 72.0, pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL: 55.0}[
                metric.metricId
            ]
            metric.nvmlReturn = pynvml.NVML_SUCCESS
        return question


NOT_SUPPORTED = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    return Answers(monkeypatch)


def test_a_gpu_that_tells_everything(answers: Answers) -> None:
    gpu = NvmlGpu("GPU-1")
    for _ in range(5):
        assert gpu.sample() == GpuSample(
            utilization=0.97,
            sm_active=0.72,
            memory_bandwidth=0.55,
            memory_used=30.0,
            memory_total=80.0,
            power=650.5,
            energy=7.0,
            temperature=61.0,
        )
    assert answers.samples == 1


def test_what_the_driver_does_not_tell_is_not_there(answers: Answers) -> None:
    answers.values |= dict.fromkeys(
        ("nvmlGpmQueryDeviceSupport", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption"), NOT_SUPPORTED
    )
    sample = NvmlGpu("GPU-1").sample()
    assert (sample.sm_active, sample.memory_bandwidth, sample.power, sample.energy) == (None, None, None, None)
    assert sample.utilization == 0.97


def test_a_machine_without_the_library_says_so() -> None:
    with pytest.raises(NvmlMissing, match="NVML says"):
        NvmlGpu("GPU-1")


def test_series_come_and_go_with_what_is_known(answers: Answers) -> None:
    families = Families()
    metrics = GpuMetrics(families)
    metrics.watch(info())
    metrics.watch(info())

    async def sample() -> str:
        await metrics.sample()
        return families.render().decode()

    page = asyncio.run(sample())
    assert value(page, "slimserve_gpu_sm_active_ratio", gpu="cuda:0") == 0.72
    assert value(page, "slimserve_gpu_energy_joules_total", gpu="cuda:0") == 0
    assert value(page, "slimserve_gpu_info", gpu="cuda:0", uuid="GPU-1", driver="580.1") == 1
    answers.values |= {"nvmlDeviceGetTotalEnergyConsumption": 9_500, "nvmlDeviceGetPowerUsage": NOT_SUPPORTED}
    page = asyncio.run(sample())
    assert value(page, "slimserve_gpu_energy_joules_total", gpu="cuda:0") == 2.5
    assert "slimserve_gpu_power_watts{" not in page
    metrics.close()


def test_a_gpu_that_nothing_can_be_read_of_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    families = Families()
    metrics = GpuMetrics(families)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            metrics.watch(info())
            metrics.watch(info("cpu", None))
            asyncio.run(metrics.sample())
    assert len(caplog.records) == 1
    assert "there are no metrics of cuda:0" in caplog.text
    assert "slimserve_gpu_utilization_ratio{" not in families.render().decode()
    metrics.close()
