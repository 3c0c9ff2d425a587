"""The physical floor of a decode step: the bytes that it must read at least once, over what memory can deliver."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from engines.models.config import DecoderConfig, DeepseekConfig, ModelConfig

WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int4": 0.5 + 2 / 128, "int8": 1.0, "fp8": 1.0}
"""Bytes of one weight by format, scales of groups included."""
QUANTIZED_HEAD = 2.0
"""The same of the output layer beside quantized ones."""
GPU_BUFFER, CPU_BUFFER = 4 << 30, 256 << 20
PASSES, TRIALS = 6, 2


def distinct_experts(experts: int, per_token: int, rows: int) -> float:
    """Expected number of different experts of a layer when each of ``rows`` tokens draws ``per_token`` of them.

    Uniformly and without replacement, as our forced routing draws. vLLM's simulated routing draws with replacement,
    which reads 5.8 instead of 6 of 64 at one row, and the same from some 16 rows up.
    """
    return experts * (1 - (1 - per_token / experts) ** rows)


def decode_weights(config: ModelConfig, rows: int) -> float:
    """Weights that a decode step of ``rows`` rows reads: all but the embedding, of which it takes one line a row."""
    head = config.vocab * config.hidden
    if isinstance(config, DecoderConfig):
        return head + config.layers * _decoder_layer(config)
    moe = config.moe
    dense = 3 * config.hidden * config.intermediate
    expert = 3 * config.hidden * moe.intermediate
    shared = 3 * config.hidden * moe.shared_intermediate + moe.experts * config.hidden
    routed = distinct_experts(moe.experts, moe.experts_per_token, rows) * expert
    layers = moe.dense_layers * dense + (config.layers - moe.dense_layers) * (shared + routed)
    return head + config.layers * _latent_attention(config) + layers


def _decoder_layer(config: DecoderConfig) -> int:
    attention = config.hidden * config.head_dim * 2 * (config.heads + config.kv_heads)
    return attention + 3 * config.hidden * config.intermediate


def _latent_attention(config: DeepseekConfig) -> int:
    query = config.heads * (config.nope_dim + config.rope.dim)
    low_rank = config.q_lora_rank
    queries = config.hidden * query if low_rank is None else low_rank * (config.hidden + query)
    latent = config.hidden * (config.kv_lora_rank + config.rope.dim)
    expand = config.kv_lora_rank * config.heads * (config.nope_dim + config.value_dim)
    return queries + latent + expand + config.heads * config.value_dim * config.hidden


def decode_bytes(config: ModelConfig, weights: str, kv_token_bytes: float, contexts: Sequence[int]) -> float:
    """Bytes that one decode step must read; ``contexts`` holds the tokens that each row attends to."""
    size = WEIGHT_BYTES[weights]
    head = config.vocab * config.hidden * max(QUANTIZED_HEAD - size, 0.0)
    return decode_weights(config, len(contexts)) * size + head + kv_token_bytes * sum(contexts)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that the fastest of a few reductions reads from a buffer far larger than any cache."""
    on_gpu = device.type == "cuda"
    buffer = torch.zeros((GPU_BUFFER if on_gpu else CPU_BUFFER) // 4, dtype=torch.float32, device=device)
    readers: tuple[Callable[[], object], ...] = (buffer.sum, buffer.amax, buffer.view(torch.float64).sum)
    seconds = min(_seconds(reader, on_gpu) for reader in readers for _ in range(TRIALS))
    return PASSES * buffer.nbytes / seconds


def _seconds(reader: Callable[[], object], on_gpu: bool) -> float:
    """Of several passes in a row, so that the host's share of a launch hides behind the pass before."""
    reader()
    if not on_gpu:
        started = time.perf_counter()
        for _ in range(PASSES):
            reader()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(PASSES):
        reader()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
