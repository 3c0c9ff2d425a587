"""64 streams at once with mixed lengths and random disconnects: nothing lost, nothing mixed up, nothing held."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass

import httpx

from benchmarks.servers import Server
from tests.metrics_text import metric, wait_until_zero

STREAMS = 64
WORDS = ("river", "stone", "light", "engine", "paper", "seven", "cloud", "garden", "winter", "music", "table", "clock")


@dataclass(frozen=True)
class Ask:
    prompt: str
    max_tokens: int
    seed: int
    temperature: float
    leaves_after: int | None
    """Events after which the client goes away; None stays to the end."""


@dataclass(frozen=True)
class Answer:
    text: str
    finished: bool


def draw(randomness: random.Random) -> Ask:
    words = randomness.choices(WORDS, k=randomness.randrange(3, 120))
    return Ask(
        prompt=f"Write about {' '.join(words)}:",
        max_tokens=randomness.randrange(4, 40),
        seed=randomness.randrange(2**31),
        temperature=randomness.choice([0.0, 0.7, 1.0]),
        leaves_after=randomness.choice([None, None, None, 2]),
    )


async def run(client: httpx.AsyncClient, ask: Ask, leaves: bool) -> Answer:
    body = {
        "model": "smollm2",
        "prompt": ask.prompt,
        "max_tokens": ask.max_tokens,
        "seed": ask.seed,
        "temperature": ask.temperature,
        "stream": True,
    }
    text, events, finished = "", 0, False
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, (await response.aread()).decode()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                finished = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                text += chunk["choices"][0]["text"]
                events += 1
            if leaves and events == ask.leaves_after:
                break
    return Answer(text, finished)


async def all_at_once(url: str, asks: list[Ask]) -> list[Answer]:
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=url, timeout=240, limits=limits) as client:
        return await asyncio.gather(*(run(client, ask, leaves=True) for ask in asks))


async def one_by_one(url: str, asks: list[Ask]) -> list[Answer]:
    async with httpx.AsyncClient(base_url=url, timeout=240) as client:
        return [await run(client, ask, leaves=False) for ask in asks]


def test_streams_together_equal_streams_alone(real_server: Server) -> None:
    asks = [draw(random.Random(seed)) for seed in range(STREAMS)]
    together = asyncio.run(all_at_once(real_server.url, asks))
    alone = asyncio.run(one_by_one(real_server.url, asks))

    for ask, answer, reference in zip(asks, together, alone, strict=True):
        assert reference.finished
        if ask.leaves_after is None:
            assert answer.finished
            assert answer.text == reference.text, ask
        else:
            assert reference.text.startswith(answer.text), ask
    wait_until_zero(
        real_server.url, "slimserve_kv_blocks_used", "slimserve_requests_running", "slimserve_requests_waiting"
    )
    assert metric(real_server.url, "slimserve_integrity_errors_total") == 0
