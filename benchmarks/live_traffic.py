"""What live runs have in common: the server that they ask, and the requests of the simulator's grid for it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from benchmarks.model_configs import CONFIGS, config_folder
from benchmarks.servers import Server, free_port, running, slimserve
from benchmarks.simulation.capacity import capacities
from benchmarks.simulation.coefficients import Coefficients, read
from benchmarks.simulation.grid import FILE, Grid, read_grid
from benchmarks.simulation.workload import SimulatedRequest, workload

CPU_MODEL = "smollm2-135m"
CPU_THREADS = 1
"""The model has a core to itself; API process and clients share another one."""
CPU_MODEL_LEN = 2048
CPU_VOCABULARY = 49_152
GPU_MODEL_LEN = 16_384


@contextlib.contextmanager
def served_model(device: str, config: str, **settings: object) -> Iterator[Server]:
    """``slimserve serve`` with a model called ``m``: SmolLM2 on the CPU, on a GPU random weights in the shapes of
    ``config``. ``settings`` are the server's, by their names in a configuration file."""
    port = free_port()
    common = ["--port", str(port), "--served-model-name", "m", "--device", device]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLIMSERVE_")}
    home = os.environ.get("SLIMSERVE_HOME")
    environment = kept | ({} if home is None else {"SLIMSERVE_HOME": home})
    environment |= {f"SLIMSERVE_{name.upper()}": str(value) for name, value in settings.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if device == "cpu":
            limits = ["--max-model-len", str(CPU_MODEL_LEN), "--threads", str(CPU_THREADS)]
            command = slimserve("serve", CPU_MODEL, *common, *limits)
        else:
            limits = ["--max-model-len", str(GPU_MODEL_LEN), "--random-weights", "0"]
            command = slimserve("serve", str(config_folder(folder, config)), *common, *limits)
        with running("slimserve", command, port, "/health/ready", env=environment, log=folder / "log") as server:
            yield server


def vocabulary(device: str, config: str) -> int:
    return CPU_VOCABULARY if device == "cpu" else int(str(CONFIGS[config]["vocab_size"]))


def live_grid(device: str, coefficients: Coefficients | None = None) -> Grid:
    """The rows for this device, with capacities from the coefficients."""
    grid = read_grid(FILE.with_name("live_cpu.toml" if device == "cpu" else "live_gpu.toml"))
    known = dict(capacities(grid, coefficients or read(grid.coefficients)))
    rows = [msgspec.structs.replace(row, capacity=known[row.name]) for row in grid.rows]
    return msgspec.structs.replace(grid, rows=rows)


def mixed_traffic(grid: Grid, load: float, seconds: float, seed: int) -> list[SimulatedRequest]:
    """Requests of all rows at once, each row at its share of the load, in the order of arrival."""
    costs, share = read(grid.coefficients).costs, load / len(grid.rows)
    grid = msgspec.structs.replace(grid, seconds=seconds)
    found = [request for row in grid.rows for request in workload(grid, row, share, seed, "scoring", costs)]
    found.sort(key=lambda request: request.arrival)
    return [dataclasses.replace(request, number=number) for number, request in enumerate(found)]
