"""Energy that the machine's own counters report, where they can be read."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

_RAPL = Path("/sys/class/powercap")


class EnergyCounter:
    """``joules`` since some moment, of the GPU, or of all CPU packages; None where no counter can be read."""

    def __init__(self, device: str) -> None:
        """``device``: cpu or cuda:N. Other programs on the device are counted too."""
        self._gpu = _gpu_handle(device) if device != "cpu" else None
        packages = sorted(_RAPL.glob("intel-rapl:?")) if device == "cpu" else []
        self._files = [package / "energy_uj" for package in packages]

    def joules(self) -> float | None:
        try:
            if self._gpu is not None:
                return float(_nvml().nvmlDeviceGetTotalEnergyConsumption(self._gpu)) / 1e3
            values = [int(file.read_text()) for file in self._files]
        except (OSError, ValueError):
            return None
        return sum(values) / 1e6 if values else None


def _gpu_handle(device: str) -> object | None:
    """None where the NVML package or the counter is missing."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    nvml = _nvml()
    try:
        nvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle: object = nvml.nvmlDeviceGetHandleByUUID(uuid)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return None
    return handle


def _nvml() -> Any:
    """The package ``nvidia-ml-py``, which has no types."""
    return importlib.import_module("pynvml")
