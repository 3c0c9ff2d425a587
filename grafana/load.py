"""A server under the kind of load that moves every panel: shared prompts, targets, classes, more than it can queue."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from benchmarks.model_configs import config_folder
from benchmarks.servers import Server, free_port, running, slimserve

TEXT = "the river runs past a mill and two old houses where people once kept bees and sold honey"
WORDS = TEXT.split()
PAUSE = 0.5
"""Seconds that a refused client waits."""


@contextlib.contextmanager
def serving(shapes: str | None, max_queue: int) -> Iterator[Server]:
    """SmolLM2, or random weights in the shapes of ``shapes``, which takes the GPU where there is one."""
    port = free_port()
    options = ["--port", str(port), "--target-ttft", "2s", "--target-tpot", "100ms"]
    environment = os.environ | {"SLIMSERVE_MAX_QUEUE": str(max_queue)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = ["smollm2-135m"]
        if shapes is not None:
            source = [str(config_folder(folder, shapes)), "--random-weights", "0", "--max-model-len", "8192"]
        command = slimserve("serve", *source, "--served-model-name", "m", *options)
        with running("slimserve", command, port, "/health/ready", env=environment, log=folder / "log") as server:
            yield server


async def drive(server: Server, clients: int, output_tokens: int, *, ids: bool, seconds: float) -> dict[str, int]:
    """Closed loop of so many clients; answers by HTTP status. ``ids`` sends token ids, for a model without words."""
    until = time.monotonic() + seconds
    counts: dict[str, int] = {}
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
        await asyncio.gather(
            *(_client(http, random.Random(number), until, output_tokens, ids, counts) for number in range(clients))
        )
    return counts


async def _client(
    http: httpx.AsyncClient, rng: random.Random, until: float, tokens: int, ids: bool, counts: dict[str, int]
) -> None:
    while time.monotonic() < until:
        body: dict[str, object] = {"model": "m", "prompt": _prompt(rng, ids), "stream": True, "ignore_eos": True}
        body |= {"max_tokens": rng.randint(tokens // 2, tokens), "priority": rng.choice(["high", "normal", "low"])}
        async with http.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_raw():
                pass
        counts[str(response.status_code)] = counts.get(str(response.status_code), 0) + 1
        if response.status_code != 200:
            await asyncio.sleep(PAUSE)


def _prompt(rng: random.Random, ids: bool) -> str | list[int]:
    """One of four beginnings, which the prefix cache finds, and an end of its own."""
    begin, end = random.Random(rng.randrange(4)), rng
    if ids:
        return [begin.randrange(1000, 100_000) for _ in range(128)] + [end.randrange(1000, 100_000) for _ in range(64)]
    return " ".join([begin.choice(WORDS) for _ in range(40)] + [end.choice(WORDS) for _ in range(12)])


def pages(server: Server, count: int, sleep: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """``/metrics`` once a second."""
    for _ in range(count):
        began = time.monotonic()
        yield httpx.get(f"{server.url}/metrics", timeout=10).raise_for_status().text
        sleep(max(0.0, 1 - (time.monotonic() - began)))


def summary(counts: dict[str, int]) -> str:
    return json.dumps(dict(sorted(counts.items())))
