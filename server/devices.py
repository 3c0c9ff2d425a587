"""Which devices this machine has, found without torch, and what worker processes get: models, and settings."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from engines.protocol import EngineSpec
from server.catalog import cache_home
from server.errors import CommandFailed, UsageError
from server.settings import ModelSettings, Settings
from server.worker.engine_status import WorkerSettings
from server.worker.process import FirstWorker


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker process: the device that it owns, and the engines that it holds."""

    device: str
    name: str
    """Of the device, or of one of several worker processes on the CPU."""
    specs: list[EngineSpec] = field(default_factory=list)


def visible_gpus() -> int:
    """NVIDIA GPUs that torch would see: 0 where the driver, the devices or torch's CUDA build is missing."""
    if not _torch_has_cuda():
        return 0
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([part for part in chosen.split(",") if part.strip() not in ("", "-1")])
    return len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])


def _torch_has_cuda() -> bool:
    """Read from torch's version file: importing torch is what the API process never does."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    version = Path(found.origin).with_name("version.py")
    return version.is_file() and re.search(r"^cuda\b.*=\s*['\"]", version.read_text(), re.MULTILINE) is not None


def worker_settings(settings: Settings) -> WorkerSettings:
    """What each worker is told of times and budgets."""
    return WorkerSettings(
        scheduler=settings.scheduler_config(),
        log_level=settings.log_level,
        log_format=settings.log_format,
        step_timeout=settings.step_timeout,
        load_timeout=settings.load_timeout,
        max_restarts=settings.max_restarts,
    )


def start_first_worker(settings: Settings) -> FirstWorker:
    """The process of the first device that ``assign`` will name, before anything else is known of the models: what it
    imports takes longer than all that this process has to do. Raises CommandFailed, or UsageError as ``assign``."""
    entry = settings.models[0]
    device = _device(entry, 0, visible_gpus())
    try:
        return FirstWorker.start(worker_settings(settings), entry.kind, device)
    except OSError as error:
        raise CommandFailed(f"a worker process cannot be started: {error.strerror}") from None


def assign(models: Sequence[tuple[ModelSettings, str]], *, gpus: int, max_batch: int | None) -> list[WorkerPlan]:
    """One worker a device, shared by all models on it. ``models`` pairs each entry with its path on this machine.

    Replica r of a model goes to GPU r, or on the CPU to process r. Raises UsageError when a device is missing.
    """
    plans: dict[str, WorkerPlan] = {}
    for entry, source in models:
        for replica in range(entry.replicas):
            device = _device(entry, replica, gpus)
            process = replica if device == "cpu" else 0
            name = f"{device}:{process}" if process else device
            plan = plans.setdefault(name, WorkerPlan(device, name))
            plan.specs.append(_spec(entry, source, device, max_batch))
    return list(plans.values())


def _device(entry: ModelSettings, replica: int, gpus: int) -> str:
    if entry.device == "cpu" or (entry.device == "auto" and (gpus == 0 or entry.kind == "onnx")):
        return "cpu"
    if gpus == 0:
        raise UsageError(f"{entry.served_name}: there is no NVIDIA GPU here that torch can use; take --device cpu")
    if ":" in entry.device and entry.replicas > 1:
        raise UsageError(f"{entry.served_name}: replicas need a GPU each; take device: cuda without a number")
    index = int(entry.device.split(":")[1]) if ":" in entry.device else replica
    if index >= gpus:
        raise UsageError(f"{entry.served_name}: GPU {index} was asked for, but there are {gpus}")
    return f"cuda:{index}"


def _spec(entry: ModelSettings, source: str, device: str, max_batch: int | None) -> EngineSpec:
    limit = entry.memory_limit
    return EngineSpec(
        name=entry.served_name,
        kind=entry.kind,
        source=source,
        device=device,
        dtype=entry.dtype,
        kv_dtype=entry.kv_dtype,
        max_model_len=entry.max_model_len,
        max_batch=max_batch,
        memory_limit=int(limit * device_memory(device)) if isinstance(limit, float) else limit,
        threads=entry.threads,
        keep_quantized=entry.keep_quantized,
        random_weights=entry.random_weights,
        uniform_routing=entry.uniform_routing,
        verified=str(cache_home() / "verified"),
        fake_step_seconds=entry.fake_step_seconds,
    )


def device_memory(device: str) -> int:
    """All bytes of the device: of a GPU its memory, of the CPU what the container's limit leaves of the RAM."""
    if device == "cpu":
        return min([psutil.virtual_memory().total, *_cgroup_limits()])
    command = shutil.which("nvidia-smi")
    if command is None:
        raise UsageError("--memory-limit: a share of a GPU needs nvidia-smi to read its size; give a size instead")
    query = [command, "--query-gpu=memory.total", "--format=csv,noheader,nounits", "-i", _physical_gpu(device)]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if not answer.stdout.strip().isdigit():
        raise UsageError("--memory-limit: nvidia-smi does not tell the GPU's memory; give a size instead of a share")
    return int(answer.stdout) * 2**20


def _physical_gpu(device: str) -> str:
    index = int(device.split(":")[1])
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(index) if chosen is None else chosen.split(",")[index].strip()


def _cgroup_limits() -> list[int]:
    """Memory limits of this process's control groups, version 2 or 1."""
    paths = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    texts = [Path(path).read_text().strip() for path in paths if Path(path).is_file()]
    return [int(text) for text in texts if text.isdigit()]
