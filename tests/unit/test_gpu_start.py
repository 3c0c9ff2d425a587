"""Opening a GPU beside imports: the driver is a library that says what it was asked for."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading

import pytest

from engines import gpu_start


class Driver:
    """Of CUDA's driver what is called; ``devices`` of them are there."""

    def __init__(self, devices: int) -> None:
        self._devices = devices
        self.retained: list[int] = []

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the driver's own name
        assert flags == 0
        return 0 if self._devices else 100

    def cuDeviceGet(self, device: object, index: int) -> int:  # noqa: N802
        if index >= self._devices:
            return 101
        device._obj.value = index  # type: ignore[attr-defined]
        return 0

    def cuDevicePrimaryCtxRetain(self, context: object, device: ctypes.c_int) -> int:  # noqa: N802
        self.retained.append(device.value)
        return 0


def opened(device: str, driver: Driver | OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Driver:
        assert name == "libcuda.so.1"
        if isinstance(driver, OSError):
            raise driver
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(gpu_start, "hash_triton", lambda: None)
    before = set(threading.enumerate())
    gpu_start.open_gpu(device)
    for thread in set(threading.enumerate()) - before:
        thread.join(20)


@pytest.mark.parametrize(
    ("device", "devices", "retained"), [("cuda:1", 2, [1]), ("cuda", 2, [0]), ("cuda:1", 1, []), ("cuda:0", 0, [])]
)
def test_the_context_of_the_device_that_was_named(
    device: str, devices: int, retained: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(devices)
    opened(device, driver, monkeypatch)
    assert driver.retained == retained


def test_a_machine_without_a_driver_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    opened("cuda:0", OSError("libcuda.so.1: cannot open shared object file"), monkeypatch)


def test_nothing_of_it_waits_for_torch() -> None:
    script = "import sys, engines.registry, engines.gpu_start\nprint('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == "False"
