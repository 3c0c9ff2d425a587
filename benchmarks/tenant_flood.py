"""Does one tenant that floods make another wait? The steady tenant's time to first token, alone and under the flood.

    python -m benchmarks.tenant_flood                       # fake engine, steps of 20 ms
    python -m benchmarks.tenant_flood --model smollm2-135m --rate 2 --clients 64 --tokens 40
    python -m benchmarks.tenant_flood --config r1-7b --output tenant_flood_gpu      # random weights, on a GPU

The steady tenant sends at a fixed mean rate (Poisson). The flooding one has ``--clients`` clients,
each of which sends its next request as soon as the last one ended, and a second after one that was
refused.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.http_client import Answer, ask
from benchmarks.model_configs import CONFIGS, config_folder
from benchmarks.servers import free_port, running, slimserve
from server.tenants import hash_key

BAR = 1.5
STEADY, FLOOD = "the-steady-tenant-s-key", "the-flooding-tenant-s-key"
REFUSED_PAUSE = 1.0
"""Seconds until a flooding client that was refused tries again: the shortest Retry-After."""


@dataclass(frozen=True, slots=True)
class Load:
    port: int
    model: str
    rate: float
    """Requests a second of the steady tenant."""
    clients: int
    """Of the flooding tenant."""
    tokens: int
    """Mean output tokens of a request."""
    words: int = 30

    def body(self, chance: random.Random) -> dict[str, object]:
        """A streamed request whose output is up to half as long or half longer than the mean."""
        return {
            "model": self.model,
            "prompt": [chance.randrange(100) for _ in range(self.words)],
            "max_tokens": chance.randint(self.tokens // 2, self.tokens * 3 // 2),
            "ignore_eos": True,
            "stream": True,
        }

    async def steady(self, seconds: float, seed: int) -> list[Answer]:
        chance = random.Random(seed)
        pending = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pending.append(asyncio.create_task(ask(self.port, self.body(chance), key=STEADY)))
            await asyncio.sleep(chance.expovariate(self.rate))
        return list(await asyncio.gather(*pending))

    async def flood(self, index: int) -> None:
        chance = random.Random(index)
        while True:
            answer = await ask(self.port, self.body(chance), key=FLOOD)
            if answer.status != 200:
                await asyncio.sleep(REFUSED_PAUSE)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the steady tenant saw. Seconds to the first token."""

    requests: int
    refused: int
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Seen:
        times = sorted(answer.first for answer in answers if answer.status == 200)
        p50, p90, p99 = (times[int(len(times) * share)] for share in (0.5, 0.9, 0.99))
        return cls(len(answers), len(answers) - len(times), p50, p90, p99)


async def alone_and_flooded(load: Load, seconds: float) -> tuple[Seen, Seen]:
    """The steady tenant without the flood, then with it."""
    await load.steady(2, seed=0)
    alone = Seen.of(await load.steady(seconds, seed=1))
    flood = [asyncio.create_task(load.flood(index)) for index in range(load.clients)]
    await load.steady(3, seed=2)
    flooded = Seen.of(await load.steady(seconds, seed=1))
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)
    return alone, flooded


@contextlib.contextmanager
def server_of_two_tenants(
    folder: Path, model: dict[str, object], *, max_concurrent: int | None, max_batch: int | None = None
) -> Iterator[int]:
    """Its port. ``model`` is the entry of the configuration, ``max_concurrent`` the flooding tenant's."""
    flooding = {"name": "flood", "keys": [hash_key(FLOOD)], "max_concurrent": max_concurrent}
    entries = [{"name": "steady", "keys": [hash_key(STEADY)]}, flooding]
    (folder / "tenants.yaml").write_text(json.dumps({"tenants": entries}))
    config = {"tenants": str(folder / "tenants.yaml"), "max_batch": max_batch, "models": [model]}
    (folder / "config.yaml").write_text(json.dumps(config))
    port = free_port()
    command = slimserve("serve", "--config", str(folder / "config.yaml"), "--port", str(port))
    with running("slimserve", command, port, "/health/ready", log=folder / "log"):
        yield port


def entry(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Of the configuration, for a model called ``m``."""
    if arguments.config:
        return {"name": "m", "source": str(config_folder(folder, arguments.config)), "random_weights": 0}
    if arguments.model == "fake":
        return fake_model(arguments.step_ms / 1000)
    return {"name": "m", "source": arguments.model}


def fake_model(step_seconds: float) -> dict[str, object]:
    return {"name": "m", "kind": "fake", "fake_step_seconds": step_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fake")
    parser.add_argument("--config", choices=list(CONFIGS), help="instead: shapes with random weights, on a GPU")
    parser.add_argument("--max-batch", type=int, help="rows of a step; default: what the engine takes")
    parser.add_argument("--step-ms", type=float, default=20.0, help="of the fake engine")
    parser.add_argument("--rate", type=float, default=10.0, help="steady requests a second")
    parser.add_argument("--clients", type=int, default=300, help="of the flooding tenant")
    parser.add_argument("--max-concurrent", type=int, help="quota of the flooding tenant; default none")
    parser.add_argument("--tokens", type=int, default=40, help="mean output length")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each of the two phases")
    parser.add_argument("--output", default="tenant_flood", help="name of the file under benchmarks/results")
    arguments = parser.parse_args()
    facts = report.print_header("Tenant flood")
    quota, rows = arguments.max_concurrent, arguments.max_batch
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with server_of_two_tenants(folder, entry(arguments, folder), max_concurrent=quota, max_batch=rows) as port:
            load = Load(port, "m", arguments.rate, arguments.clients, arguments.tokens)
            alone, flooded = asyncio.run(alone_and_flooded(load, arguments.seconds))
    for name, seen in (("alone", alone), ("flooded", flooded)):
        times = f"p50 {seen.p50 * 1000:.1f} ms  p99 {seen.p99 * 1000:.1f} ms"
        print(f"  {name:8} {seen.requests} requests, {seen.refused} refused, first token {times}", flush=True)
    ratio = flooded.p99 / alone.p99
    print(f"p99 under the flood {ratio:.2f} times that without; bar {BAR}")
    rows = {"alone": asdict(alone), "flooded": asdict(flooded)}
    path = report.write(arguments.output, {"machine": facts, "load": vars(arguments), "ratio": ratio, **rows})
    print(f"written to {path.relative_to(report.ROOT)}")
    if ratio > BAR:
        raise SystemExit("the bar is missed")


if __name__ == "__main__":
    main()
