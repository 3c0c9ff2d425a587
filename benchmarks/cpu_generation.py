"""Output tokens/s on the CPU, over HTTP, against llama.cpp's server and transformers, on one SmolLM2 file.

    python -m benchmarks.cpu_generation --llama-server PATH/llama-server

Each repeat sends fresh prompts of 128 random words to one server after the other (interleaved) and takes 128
output tokens a request, ignoring EOS, greedy, streamed; prefill counts into the time. One client process. The
prefix cache cannot help: prompts are fresh, and reported hits are asserted to be 0. llama.cpp runs in every
combination of Q4_1, F16, Q8_0, Q4_0 and 1 or 2 threads; the best one at each number of streams is the peer, and those
far from it are asked only once. Ours serves the same files, their blocks kept, and what ``--folders`` names besides.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks import report
from benchmarks.servers import Server, free_port, running, slimserve
from engines.gguf_header import read_gguf_header

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 128
LLAMA_FORMATS = ("Q4_1", "F16", "Q8_0", "Q4_0")
OUR_SETTINGS = ("Q4_1-float32-float32", "Q4_1-float32-bfloat16", "Q8_0-float32-bfloat16", "Q4_0-float32-bfloat16")
HOPELESS = 0.7
"""A llama.cpp server below this share of the best one's first repeat is not asked again at that number of streams."""


@dataclass
class Figures:
    """Tokens per second by number of streams, one entry a repeat."""

    by_streams: dict[int, list[float]] = field(default_factory=dict)

    def add(self, streams: int, rate: float) -> None:
        self.by_streams.setdefault(streams, []).append(rate)

    def median(self, streams: int) -> float:
        return statistics.median(self.by_streams[streams])


@functools.cache
def plain_words(model: Path) -> list[int]:
    """Ids of the vocabulary that are a space and a plain word. On other ids the model says what llama.cpp's server
    cannot always parse, and then it fails the request."""
    tokens = read_gguf_header(model).metadata["tokenizer.ggml.tokens"]
    return [index for index, token in enumerate(tokens) if re.fullmatch("\u0120[a-z]{3,}", token)]


def fresh_prompts(model: Path, count: int, randomness: random.Random) -> list[list[int]]:
    return [randomness.choices(plain_words(model), k=PROMPT_TOKENS) for _ in range(count)]


@dataclass(frozen=True)
class Work:
    """Tokens that one stream took."""

    prompt: int
    cached: int
    output: int


EXPECTED = Work(PROMPT_TOKENS, 0, OUTPUT_TOKENS)
COMMON = {"temperature": 0, "ignore_eos": True, "stream": True}


async def one_stream(client: httpx.AsyncClient, server: Server, prompt: list[int]) -> None:
    """Raises RuntimeError where the server did not do all the work, or took some of it from a cache."""
    is_llama = server.name.startswith("llama.cpp")
    path, body = ("/completion", llama_body(prompt)) if is_llama else ("/v1/completions", our_body(prompt))
    tail = b""
    async with client.stream("POST", server.url + path, json=body) as response:
        async for chunk in response.aiter_raw():
            tail = (tail + chunk)[-16384:]
    events = [line.removeprefix(b"data: ") for line in tail.split(b"\n") if line.startswith(b"data: {")]
    done = (llama_work if is_llama else our_work)(json.loads(events[-1])) if events else None
    if done != EXPECTED:
        raise RuntimeError(f"{server.name} did {done} instead of {EXPECTED}: {tail[-500:]!r}")


def our_body(prompt: list[int]) -> dict[str, Any]:
    usage = {"stream_options": {"include_usage": True}}
    return COMMON | usage | {"model": "smollm2", "prompt": prompt, "max_tokens": OUTPUT_TOKENS}


def our_work(event: dict[str, Any]) -> Work | None:
    usage = event.get("usage")
    if not usage:
        return None
    return Work(usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], usage["completion_tokens"])


def llama_body(prompt: list[int]) -> dict[str, Any]:
    return COMMON | {"prompt": prompt, "n_predict": OUTPUT_TOKENS, "cache_prompt": False}


def llama_work(event: dict[str, Any]) -> Work | None:
    timings = event.get("timings")
    return timings and Work(timings["prompt_n"], timings["cache_n"], timings["predicted_n"])


async def tokens_per_second(server: Server, prompts: Sequence[list[int]]) -> float:
    limits = httpx.Limits(max_connections=len(prompts))
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        started = time.perf_counter()
        await asyncio.gather(*(one_stream(client, server, prompt) for prompt in prompts))
        return len(prompts) * OUTPUT_TOKENS / (time.perf_counter() - started)


def requantized(source: Path, target_format: str, folder: Path) -> Path:
    """The same model with its large matrices in another GGUF format, from the file's own dequantized weights."""
    import gguf

    if target_format == "Q4_1":
        return source
    target = folder / f"smollm2-{target_format}.gguf"
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for entry in reader.fields.values():
        if entry.name.startswith("GGUF.") or entry.name in ("general.architecture", "general.file_type"):
            continue
        kind = entry.types[0]
        sub = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(entry.name, entry.contents(), kind, sub_type=sub)
    kind = gguf.GGMLQuantizationType[target_format]
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def start_llama(stack: contextlib.ExitStack, binary: Path, model: Path, name: str, threads: int, logs: Path) -> Server:
    port = free_port()
    command = [str(binary), "-m", str(model), "-np", "32", "-c", "16384", "-t", str(threads), "-tb", str(threads)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--no-webui"]
    env = os.environ | {"LD_LIBRARY_PATH": str(binary.parent)}
    log = logs / f"{name.replace(' ', '-')}.log"
    return stack.enter_context(running(name, command, port, "/health", env=env, log=log))


def start_ours(stack: contextlib.ExitStack, model: Path, name: str, logs: Path) -> Server:
    """``name`` ends in the dtypes of activations and KV, as in ``Q4_1-float32-bfloat16``."""
    port = free_port()
    _, dtype, kv_dtype = name.rsplit("-", 2)
    command = slimserve("serve", str(model), "--port", str(port), "--served-model-name", "smollm2", "--max-batch", "32")
    command += ["--device", "cpu", "--dtype", dtype, "--kv-dtype", kv_dtype, "--keep-quantized"]
    log = logs / f"{name}.log"
    return stack.enter_context(running(f"slimserve {name}", command, port, "/health/ready", log=log))


def measure_transformers(model: Path, stream_counts: Sequence[int], repeats: int) -> dict[str, Figures]:
    """In a process of its own: ``generate`` one prompt after the other, and all of them as one static batch."""
    command = [sys.executable, "-m", "benchmarks.transformers_generate", str(model), str(repeats)]
    command += [str(count) for count in stream_counts]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=report.ROOT).stdout
    figures: dict[str, Figures] = {}
    for row in json.loads(output.strip().splitlines()[-1]):
        figures.setdefault(row["name"], Figures()).add(row["streams"], row["rate"])
    return figures


def print_table(figures: dict[str, Figures], stream_counts: Sequence[int], peers: dict[int, str]) -> None:
    print("\noutput tokens/s, median of repeats [min .. max]; ratio to the best llama.cpp")
    for name, rows in figures.items():
        cells = []
        for count in stream_counts:
            rates = rows.by_streams[count]
            ratio = rows.median(count) / figures[peers[count]].median(count)
            cells.append(f"{count:>3}: {rows.median(count):7.1f} [{min(rates):6.1f} ..{max(rates):6.1f}] {ratio:5.2f}x")
        print(f"{name:28s} " + "   ".join(cells))
    print("best llama.cpp: " + ", ".join(f"{count} streams: {peers[count]}" for count in stream_counts))


def contenders(servers: Sequence[Server], figures: dict[str, Figures], count: int) -> list[Server]:
    """All servers but the llama.cpp ones that have been far from the best of them."""
    first = {name: rows.by_streams[count][0] for name, rows in figures.items() if count in rows.by_streams}
    best = max((rate for name, rate in first.items() if name.startswith("llama.cpp")), default=0.0)
    return [
        server
        for server in servers
        if not server.name.startswith("llama.cpp") or first.get(server.name, best) >= HOPELESS * best
    ]


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Figures]:
    randomness = random.Random(arguments.seed)
    figures: dict[str, Figures] = {}
    with contextlib.ExitStack() as stack:
        files = {kind: requantized(arguments.model, kind, folder) for kind in LLAMA_FORMATS}
        ours = {name: files[name.split("-")[0]] for name in arguments.ours}
        ours |= {f"{path.name}-float32-bfloat16": path for path in arguments.folders}
        servers = [start_ours(stack, path, name, folder) for name, path in ours.items()]
        for setting in arguments.llama:
            kind, threads = setting.split("-")
            name = f"llama.cpp {kind} {threads}t"
            servers.append(start_llama(stack, arguments.llama_server, files[kind], name, int(threads), folder))
        for server in servers:
            asyncio.run(tokens_per_second(server, fresh_prompts(arguments.model, 2, randomness)))
        for repeat in range(arguments.repeats):
            for count in arguments.streams:
                for server in contenders(servers, figures, count):
                    prompts = fresh_prompts(arguments.model, count, randomness)
                    rate = asyncio.run(tokens_per_second(server, prompts))
                    figures.setdefault(server.name, Figures()).add(count, rate)
                    print(
                        f"  repeat {repeat + 1}  {count:>2} streams  {server.name:24s} {rate:8.1f} tokens/s", flush=True
                    )
    return figures


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=Path, required=True, help="llama.cpp's server, libraries beside it")
    parser.add_argument("--model", type=Path, help="SmolLM2 Q4_1 GGUF; default: the catalogue's")
    parser.add_argument("--ours", nargs="*", default=list(OUR_SETTINGS), help="file type, dtype and KV dtype of each")
    parser.add_argument("--folders", nargs="*", type=Path, default=[], help="engine folders, in float32 with 16-bit KV")
    parser.add_argument(
        "--llama", nargs="+", default=[f"{kind}-{threads}" for kind in LLAMA_FORMATS for threads in (1, 2)]
    )
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--output", default="cpu_generation", help="name under benchmarks/results")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.model is None:
        from server.catalog import resolve

        arguments.model = resolve("smollm2-135m")
    facts = report.print_header("CPU generation")
    print(f"  seed: {arguments.seed}")
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments, Path(folder))
    if not arguments.no_transformers:
        figures |= measure_transformers(arguments.model, arguments.streams, arguments.repeats)
    llama = [name for name in figures if name.startswith("llama.cpp")]
    peers = {count: max(llama, key=lambda name: figures[name].median(count)) for count in arguments.streams}
    print_table(figures, arguments.streams, peers)
    rates = {name: rows.by_streams for name, rows in figures.items()}
    result = {"machine": facts, "seed": arguments.seed, "tokens_per_second": rates, "best_llama_cpp": peers}
    path = report.write(arguments.output, result)
    print(f"written to {path.relative_to(report.ROOT)}")


if __name__ == "__main__":
    main()
