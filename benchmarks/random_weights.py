"""Serve a published model's shapes with random weights and stream from it over HTTP: speed without a download.

    python -m benchmarks.random_weights --config r1-1.5b --streams 64

Random weights compute exactly as many operations as real ones. Prompts are fresh random tokens, output lengths fixed
(EOS ignored), temperature 0.6; prefill counts into the time. Prints output tokens/s, TTFT and TPOT.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks import report
from benchmarks.servers import Server, free_port, running, slimserve

QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6}
CONFIGS: dict[str, dict[str, object]] = {
    "r1-1.5b": QWEN2
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rope_theta": 10000,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151646,
        "eos_token_id": 151643,
    },
    "r1-7b": QWEN2
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_theta": 10000,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151646,
        "eos_token_id": 151643,
    },
    "v2-lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "vocab_size": 102400,
        "rope_theta": 10000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 100000,
        "eos_token_id": 100001,
    },
}


@dataclass(frozen=True)
class StreamTimes:
    """Seconds."""

    ttft: float
    tpot: float


async def one_stream(client: httpx.AsyncClient, url: str, prompt: list[int], tokens: int) -> StreamTimes:
    body = {
        "model": "random",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0.6,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, usage = time.perf_counter(), 0.0, {}
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter()
            if '"usage":{' in line:
                usage = json.loads(line[6:])["usage"]
    ended = time.perf_counter()
    assert usage["completion_tokens"] == tokens, usage
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0, usage
    return StreamTimes(first - started, (ended - first) / max(tokens - 1, 1))


async def one_round(server: Server, arguments: argparse.Namespace, randomness: random.Random) -> dict[str, float]:
    vocabulary = int(str(CONFIGS[arguments.config]["vocab_size"])) * 9 // 10
    prompts = [
        [randomness.randrange(vocabulary) for _ in range(arguments.prompt_tokens)] for _ in range(arguments.streams)
    ]
    limits = httpx.Limits(max_connections=arguments.streams)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        started = time.perf_counter()
        streams = [one_stream(client, server.url, prompt, arguments.output_tokens) for prompt in prompts]
        times = await asyncio.gather(*streams)
        wall = time.perf_counter() - started
    return {
        "tokens_per_second": arguments.streams * arguments.output_tokens / wall,
        "ttft_p50_ms": statistics.median(row.ttft for row in times) * 1000,
        "tpot_p50_ms": statistics.median(row.tpot for row in times) * 1000,
    }


def device_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(CONFIGS), default="r1-1.5b")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", help="name under benchmarks/results")
    arguments = parser.parse_args()
    facts = report.print_header(f"Random weights: {arguments.config}, {arguments.streams} streams")
    facts["device"] = device_name()
    print(f"  device: {facts['device']}")
    port, rows = free_port(), []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / arguments.config
        model.mkdir()
        (model / "config.json").write_text(json.dumps(CONFIGS[arguments.config]))
        command = slimserve("serve", str(model), "--random-weights", "0", "--port", str(port))
        command += ["--served-model-name", "random", "--max-model-len", "4096"]
        started = time.perf_counter()
        with running("slimserve", command, port, "/health/ready", log=Path(folder) / "log") as server:
            print(f"  ready after {time.perf_counter() - started:.1f} s")
            asyncio.run(one_round(server, arguments, random.Random()))
            for _ in range(arguments.repeats):
                row = asyncio.run(one_round(server, arguments, random.Random()))
                rows.append(row)
                print("  " + "  ".join(f"{key} {value:,.1f}" for key, value in row.items()), flush=True)
    median = statistics.median(row["tokens_per_second"] for row in rows)
    print(f"median {median:,.0f} output tokens/s")
    shape = {key: getattr(arguments, key) for key in ("config", "streams", "prompt_tokens", "output_tokens")}
    result = {"machine": facts, **shape, "repeats": rows, "median_tokens_per_second": median}
    path = report.write(arguments.output or f"random_weights_{arguments.config}_{arguments.streams}", result)
    print(f"written to {path.relative_to(report.ROOT)}")


if __name__ == "__main__":
    main()
