"""The generation engine on a CUDA device, against the same weights on the CPU. Random weights only."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engines.generation.engine import GenerationEngine
from engines.kernels import gumbel_noise
from engines.manifest import read_manifest
from engines.models import loader
from engines.models.weights import RandomSource
from engines.protocol import SamplingParams, TokenLogprobs
from server.worker.wire import Item
from tests.unit.generation.sampling import draw_together
from tests.unit.generation.streams import Streams, item, mixed_items
from tests.unit.generation.test_sampler import random_case
from tests.unit.generation.tiny_models import DEEPSEEK, LLAMA, load_tiny, model_folder, tiny_spec

QWEN_1_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151643,
}
"""The shapes of DeepSeek-R1-Distill-Qwen-1.5B."""


@pytest.fixture(scope="module", params=["llama", "deepseek"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights in a file: random weights differ between kinds of devices."""
    folder = model_folder(tmp_path_factory.mktemp("models"), LLAMA if request.param == "llama" else DEEPSEEK)
    taken: dict[str, torch.Tensor] = {}

    class RecordingSource(RandomSource):
        def take(self, name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
            taken[name] = super().take(name, *args, **kwargs)
            return taken[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "RandomSource", RecordingSource)
        manifest = read_manifest(folder, random_weights=True)
        cpu = torch.device("cpu")
        loader.load_model(manifest, tiny_spec(folder), cpu, torch.float32, lambda progress: None)
    save_file({name: tensor.clone().contiguous() for name, tensor in taken.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def engines(checkpoint: Path) -> Iterator[tuple[GenerationEngine, GenerationEngine]]:
    """On the CPU and on the GPU."""
    pair = [
        load_tiny(checkpoint, random_weights=None, device=device, dtype="float32", memory_limit=256 << 20)
        for device in ("cpu", "cuda")
    ]
    yield pair[0], pair[1]
    for engine in pair:
        engine.close()


def run(engine: GenerationEngine, items: list[Item], **config: Any) -> Streams:
    streams = Streams(engine, **config)
    for request in items:
        streams.offer([request])
    streams.run()
    return streams


def test_logprobs_are_those_of_the_cpu(engines: tuple[GenerationEngine, GenerationEngine]) -> None:
    rng = random.Random(1)
    settings = SamplingParams(seed=1, temperature=0, logprobs=5)
    requests = [
        Item(
            item=number,
            request=number,
            engine="tiny",
            tokens=[rng.randrange(300) for _ in range(50)],
            prompt_length=50,
            max_tokens=8,
            sampling=settings,
            prompt_logprobs=3,
        )
        for number in range(8)
    ]
    on_cpu, on_gpu = (run(engine, requests, token_budget=30) for engine in engines)
    assert on_cpu.tokens == on_gpu.tokens
    for number in range(8):
        for cpu, gpu in (
            (on_cpu.logprobs[number], on_gpu.logprobs[number]),
            (on_cpu.prompt_logprobs[number], on_gpu.prompt_logprobs[number]),
        ):
            assert len(cpu) == len(gpu) > 0
            assert distance(cpu, gpu) < 1e-4


def distance(left: list[TokenLogprobs], right: list[TokenLogprobs]) -> float:
    return max(
        abs(a - b)
        for one, two in zip(left, right, strict=True)
        for a, b in zip([one.logprob, *one.top_logprobs], [two.logprob, *two.top_logprobs], strict=True)
    )


def test_mixed_requests_get_the_tokens_that_the_cpu_draws(engines: tuple[GenerationEngine, GenerationEngine]) -> None:
    requests = mixed_items(24, 300, random.Random(3))
    on_cpu, on_gpu = (run(engine, requests) for engine in engines)
    # Sums in another order may tip a draw that is nearly a tie, and all tokens after it; that is rare.
    equal = sum(on_cpu.tokens[request.item] == on_gpu.tokens[request.item] for request in requests)
    assert equal >= len(requests) - 1
    assert on_cpu.ends.keys() == on_gpu.ends.keys()


def test_few_blocks_and_chunks_change_no_token(engines: tuple[GenerationEngine, GenerationEngine]) -> None:
    requests = mixed_items(12, 300, random.Random(4))
    whole = run(engines[1], requests, prefix_cache=False)
    cut = run(engines[1], requests, blocks=16, token_budget=16)
    equal = sum(whole.tokens[request.item] == cut.tokens[request.item] for request in requests)
    assert equal >= len(requests) - 1


def test_noise_is_the_same_on_both_devices() -> None:
    seeds = torch.tensor([0, 1, -1, 1 << 40, -(1 << 62)])
    choices, positions = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 7, 1000, 5, 131071])
    on_cpu = gumbel_noise(seeds, choices, positions, 5000)
    on_gpu = gumbel_noise(seeds.cuda(), choices.cuda(), positions.cuda(), 5000).cpu()
    assert torch.allclose(on_cpu, on_gpu, rtol=0, atol=1e-6)


def test_the_sampler_draws_the_same_on_both_devices() -> None:
    rng = random.Random(5)
    cases = [random_case(rng) for _ in range(60)]
    assert draw_together(cases, "cuda") == draw_together(cases)


def test_64_streams_of_a_1_5b_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = load_tiny(
        model_folder(tmp_path, QWEN_1_5B), device="cuda", max_batch=64, max_step_tokens=8192, max_model_len=4096
    )
    rng = random.Random(6)
    rates = []
    for _ in range(2):
        streams = Streams(engine, clock=time.perf_counter, prefix_cache=False)
        for number in range(64):
            streams.offer([item(number, [rng.randrange(151936) for _ in range(128)], 128, temperature=0.6, top_p=0.95)])
        began = time.perf_counter()
        streams.run()
        rates.append(64 * 128 / (time.perf_counter() - began))
        assert all(len(tokens) == 128 for tokens in streams.tokens.values())
    info = engine.info
    engine.close()
    with capsys.disabled():
        print(  # noqa: T201
            f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}: R1-Distill-Qwen-1.5B shapes, {info.dtype}, "
            f"64 streams x 128 in / 128 out: {max(rates):.0f} tokens/s (first run {rates[0]:.0f}), "
            f"{streams.steps} steps, {info.weight_bytes / 1e9:.1f} GB weights, {info.kv_bytes / 1e9:.1f} GB KV"
        )
