"""The runner of GPUs on this machine: its kernels under Triton's interpreter, without graphs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engines.generation.engine import GenerationEngine
from engines.protocol import Capacity
from tests.unit.generation.streams import Streams, mixed_items
from tests.unit.generation.tiny_models import DEEPSEEK, LLAMA, load_tiny, model_folder

triton_interpreter = pytest.importorskip("tests.triton_interpreter", reason="needs Triton")


class Instant:
    """What the runner needs of a CUDA event; the host has done the work when it makes one."""

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Instant) -> float:
        return 1.0


def load_with_gpu_runner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> GenerationEngine:
    from engines.generation import choose_runner, gpu_runner, loading

    def make(
        model: object, caches: object, capacity: Capacity, device: torch.device, clock: Callable[[], float], *_: object
    ) -> object:
        return gpu_runner.GpuStepRunner(model, caches, capacity, device, clock, graph_memory=0)  # type: ignore[arg-type]

    monkeypatch.setattr(gpu_runner, "timestamp", Instant)
    monkeypatch.setattr(loading, "make_runner", make)
    assert choose_runner.make_runner is not make
    return load_tiny(folder)


@pytest.mark.parametrize("config", [LLAMA, DEEPSEEK], ids=["llama", "deepseek"])
def test_draws_the_tokens_of_the_plain_runner(
    config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path, config)
    plain = load_tiny(folder)
    device = load_with_gpu_runner(folder, monkeypatch)
    results = []
    for engine in (plain, device):
        streams = Streams(engine, blocks=24)
        items = mixed_items(6, 300, random.Random(5), longest=20)
        for number in range(0, len(items), 3):
            streams.offer(items[number : number + 3])
            streams.step()
        streams.run()
        results.append((streams.tokens, streams.ends, streams.cached, streams.prompt_logprobs))
        assert streams.logprobs
    assert results[0] == results[1]
    plain.close()
    device.close()
