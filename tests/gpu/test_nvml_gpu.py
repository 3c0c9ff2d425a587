"""What NVML really says of the GPU that torch computes on."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch

from engines.protocol import EngineInfo, Gpu
from server.gpu_metrics import GpuMetrics
from server.metric_families import Families
from server.nvml import NvmlGpu
from tests.metrics_text import value

pytestmark = pytest.mark.gpu


def keep_busy(seconds: float) -> None:
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(20):
            matrix @ matrix
        torch.cuda.synchronize()


def test_a_busy_gpu_is_seen() -> None:
    properties = torch.cuda.get_device_properties(0)
    gpu = NvmlGpu(f"GPU-{properties.uuid}")
    idle = gpu.sample()
    keep_busy(2.0)
    busy = gpu.sample()
    assert busy.utilization is not None
    assert busy.utilization > 0.5
    assert busy.memory_used is not None
    assert busy.memory_total is not None
    assert 3 * 8192 * 8192 < busy.memory_used < busy.memory_total
    assert busy.memory_total == pytest.approx(properties.total_memory, rel=0.1)
    if busy.power is not None and idle.energy is not None and busy.energy is not None:
        assert 50 < busy.power < 2000
        assert 50 < busy.energy - idle.energy < 8000
    for share in (busy.sm_active, busy.memory_bandwidth):
        assert share is None or 0 < share <= 1
    if busy.sm_active is not None:
        assert busy.sm_active > 0.3


def test_its_series_are_on_the_page() -> None:
    properties = torch.cuda.get_device_properties(0)
    families = Families()
    metrics = GpuMetrics(families)
    gpu = Gpu(name=properties.name, uuid=f"GPU-{properties.uuid}")
    metrics.watch(
        EngineInfo(
            name="m",
            fingerprint="f",
            device="cuda:0",
            dtype="bfloat16",
            kv_dtype="bfloat16",
            weight_bytes=1,
            kv_bytes=1,
            threads=1,
            load_seconds=1.0,
            vocab_size=8,
            gpu=gpu,
        )
    )
    asyncio.run(metrics.sample())
    assert value(families.render().decode(), "slimserve_gpu_utilization_ratio", gpu="cuda:0") <= 1
    metrics.close()
