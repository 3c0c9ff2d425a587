"""The memory of an engine on a CUDA device: what is measured at load covers what steps take later."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from engines.generation import choose_runner
from engines.kernels import backends
from tests.unit.generation.streams import Streams, item
from tests.unit.generation.tiny_models import load_tiny, model_folder

WIDE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 512,
    "intermediate_size": 4096,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
}
"""Little KV, so that workspace is what counts."""
COSTLY: list[dict[str, Any]] = [
    {"top_p": 0.9, "top_k": 500, "min_p": 1e-6},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "top_p": 0.95},
    {"logprobs": 20},
    {"temperature": 0},
]
LIMIT = 5 << 30


@pytest.mark.parametrize("with_triton", [True, False])
def test_no_step_takes_more_than_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_triton: bool
) -> None:
    if not with_triton:
        for module in (backends, choose_runner):
            monkeypatch.setattr(module, "shared_triton", lambda: None)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    engine = load_tiny(
        model_folder(tmp_path, WIDE), device="cuda", max_batch=64, max_step_tokens=4096, memory_limit=LIMIT
    )
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    streams = Streams(engine, clock=time.perf_counter, prefix_cache=False)
    rng = random.Random(1)
    for number in range(90):
        length = rng.choice((4000, 9000)) if number % 12 == 0 else rng.randrange(1, 200)
        request = item(number, [rng.randrange(151936) for _ in range(length)], 12, **COSTLY[number % len(COSTLY)])
        streams.offer([msgspec.structs.replace(request, prompt_logprobs=20 if number % 5 == 0 else None)])
    streams.run()
    assert len(streams.ends) == 90
    engine.close()
    assert torch.cuda.max_memory_reserved() - before <= LIMIT
