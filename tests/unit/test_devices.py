from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from server import devices
from server.devices import assign, device_memory
from server.errors import UsageError
from server.settings import ModelSettings


def entry(name: str, **options: object) -> tuple[ModelSettings, str]:
    return ModelSettings.model_validate({"name": name, "source": name, **options}), f"models/{name}"


def placed(*models: tuple[ModelSettings, str], gpus: int) -> list[tuple[str, list[str]]]:
    return [(plan.device, [spec.name for spec in plan.specs]) for plan in assign(models, gpus=gpus, max_batch=4)]


def test_models_on_one_device_share_its_worker() -> None:
    assert placed(entry("a"), entry("b"), gpus=0) == [("cpu", ["a", "b"])]
    assert placed(entry("a"), entry("b", device="cpu"), gpus=1) == [("cuda:0", ["a"]), ("cpu", ["b"])]


def test_replicas_take_a_worker_each() -> None:
    assert placed(entry("a", replicas=2), entry("b"), gpus=0) == [("cpu", ["a", "b"]), ("cpu", ["a"])]
    assert placed(entry("a", replicas=2), gpus=2) == [("cuda:0", ["a"]), ("cuda:1", ["a"])]
    assert placed(entry("a", device="cuda:1"), gpus=2) == [("cuda:1", ["a"])]


@pytest.mark.parametrize(
    ("options", "gpus", "message"),
    [
        ({"device": "cuda"}, 0, "no NVIDIA GPU"),
        ({"device": "cuda:3"}, 2, "GPU 3"),
        ({"replicas": 3}, 2, "GPU 2"),
        ({"device": "cuda:0", "replicas": 2}, 2, "without a number"),
    ],
)
def test_a_device_that_is_not_there_is_refused(options: dict[str, object], gpus: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        placed(entry("a", **options), gpus=gpus)


def test_a_spec_carries_all_options_and_a_share_becomes_bytes() -> None:
    [plan] = assign(
        [entry("a", dtype="bfloat16", kv_dtype="float16", max_model_len=9, threads=2, memory_limit=0.5)],
        gpus=0,
        max_batch=4,
    )
    [spec] = plan.specs
    assert (spec.source, spec.dtype, spec.kv_dtype) == ("models/a", "bfloat16", "float16")
    assert (spec.max_model_len, spec.threads, spec.max_batch) == (9, 2, 4)
    assert spec.memory_limit == device_memory("cpu") // 2


def test_memory_of_the_cpu_respects_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_cgroup_limits", lambda: [1000, 2000])
    assert device_memory("cpu") == 1000


def test_memory_of_a_gpu_comes_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        calls.append(command)
        return SimpleNamespace(stdout="81559\n")

    monkeypatch.setattr("shutil.which", lambda name: "nvidia-smi")
    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert device_memory("cuda:1") == 81559 * 2**20
    assert calls[0][-1] == "6"


def test_gpus_count_only_where_torch_can_use_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert devices.visible_gpus() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.visible_gpus() == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (tmp_path / "version.py").write_text("cuda: Optional[str] = None\n")
    assert devices.visible_gpus() == 0
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert devices.visible_gpus() == 0
