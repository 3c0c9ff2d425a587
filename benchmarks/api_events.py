"""How many tokens per second one API process carries: a fake engine in a worker process, 64 SSE streams.

    python -m benchmarks.api_events

The fake engine's tokens cost nothing to compute, so what is measured is the API process: wire messages, token log,
detokenizing, stop strings, JSON, SSE. Client and worker processes share the cores with it, so the figure is tokens
per CPU-second of the API process: what it would carry with one core to itself. Besides: short requests (512 token ids
in, 128 tokens out, one after the other on each stream), of which the request itself is a part that counts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from benchmarks import report
from benchmarks.servers import Server, free_port, running, slimserve
from engines.fake import FAKE_VOCAB

BAR = 20_000
"""Tokens per second on one core."""
SHORT = 512, 128
"""Tokens in and out of a short request."""
ROUNDS = 4
"""Short requests that each stream sends."""


def configuration(step_seconds: float) -> str:
    return f"models:\n  - name: fake\n    kind: fake\n    fake_step_seconds: {step_seconds}\n"


def long_request(tokens: int) -> tuple[str, dict[str, object]]:
    """Path and body of a chat with this many output tokens."""
    body = {"messages": [{"role": "user", "content": "count"}], "max_tokens": tokens}
    return "/v1/chat/completions", body | {"stop": ["a string that never comes"]}


def short_request() -> tuple[str, dict[str, object]]:
    return "/v1/completions", {"prompt": random.choices(range(FAKE_VOCAB), k=SHORT[0]), "max_tokens": SHORT[1]}


async def stream(port: int, path: str, fields: dict[str, object]) -> tuple[int, int]:
    """Generated tokens and SSE events of one stream. Reads plain bytes: a JSON parse an event would cost the cores."""
    usage = {"include_usage": True}
    body = {"model": "fake", "stream": True, "stream_options": usage, "ignore_eos": True} | fields
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + payload)
    events, tail = 0, b""
    while chunk := await reader.read(1 << 16):
        events += chunk.count(b"data: ")
        tail = (tail + chunk)[-4096:]
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    told = [line for line in tail.split(b"\n") if b'"usage":{' in line]
    if not told or b"data: [DONE]" not in tail:
        raise RuntimeError(f"a stream broke off: {tail[-300:]!r}")
    return json.loads(told[-1].removeprefix(b"data: "))["usage"]["completion_tokens"], events


async def short_streams(port: int, rounds: int) -> tuple[int, int]:
    """One after the other."""
    results = [await stream(port, *short_request()) for _ in range(rounds)]
    return sum(tokens for tokens, _ in results), sum(events for _, events in results)


async def streams(port: int, count: int, tokens: int, rounds: int) -> tuple[int, int]:
    """At once: ``rounds`` short requests on each stream, or a long one of ``tokens`` where that is 0."""
    results = await asyncio.gather(
        *(short_streams(port, rounds) if rounds else stream(port, *long_request(tokens)) for _ in range(count))
    )
    return sum(tokens for tokens, _ in results), sum(events for _, events in results)


def client(port: int, count: int, tokens: int, rounds: int, results: multiprocessing.Queue[tuple[int, int]]) -> None:
    results.put(asyncio.run(streams(port, count, tokens, rounds)))


def run_clients(port: int, count: int, tokens: int, processes: int, rounds: int = 0) -> tuple[int, int]:
    results: multiprocessing.Queue[tuple[int, int]] = multiprocessing.Queue()
    workers = [
        multiprocessing.Process(target=client, args=(port, count // processes, tokens, rounds, results))
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    parts = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    return sum(part[0] for part in parts), sum(part[1] for part in parts)


def measure(server: Server, arguments: argparse.Namespace) -> dict[str, float]:
    port = httpx.URL(server.url).port
    assert port is not None
    api = psutil.Process(server.process.pid)
    run_clients(port, arguments.streams, 50, arguments.clients)
    before, started = api.cpu_times(), time.perf_counter()
    tokens, events = run_clients(port, arguments.streams, arguments.tokens, arguments.clients)
    wall, after = time.perf_counter() - started, api.cpu_times()
    cpu = (after.user + after.system) - (before.user + before.system)
    assert tokens == arguments.streams * arguments.tokens
    short_before = api.cpu_times()
    run_clients(port, arguments.streams, 0, arguments.clients, ROUNDS)
    short_after = api.cpu_times()
    short_cpu = (short_after.user + short_after.system) - (short_before.user + short_before.system)
    return {
        "tokens_per_cpu_second": tokens / cpu,
        "tokens_per_second": tokens / wall,
        "events_per_cpu_second": events / cpu,
        "tokens_per_event": tokens / events,
        "api_core_share": cpu / wall,
        "short_request_cpu_ms": short_cpu / (arguments.streams * ROUNDS) * 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1900, help="output tokens of each stream")
    parser.add_argument("--clients", type=int, default=2, help="client processes")
    parser.add_argument("--step-ms", type=float, default=2.0, help="time of one fake step")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    facts = report.print_header("API events")
    port = free_port()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "fake.yaml"
        config.write_text(configuration(arguments.step_ms / 1000))
        command = slimserve("serve", "--config", str(config), "--port", str(port))
        with running("slimserve", command, port, "/health/ready", log=Path(folder) / "log") as server:
            for _ in range(arguments.repeats):
                row = measure(server, arguments)
                rows.append(row)
                print("  " + "  ".join(f"{key} {value:,.1f}" for key, value in row.items()), flush=True)
    median = statistics.median(row["tokens_per_cpu_second"] for row in rows)
    print(f"median {median:,.0f} tokens/s on one core of API process; bar {BAR:,}; ratio {median / BAR:.2f}")
    path = report.write("api_events", {"machine": facts, "streams": arguments.streams, "repeats": rows, "bar": BAR})
    print(f"written to {path.relative_to(report.ROOT)}")


if __name__ == "__main__":
    main()
