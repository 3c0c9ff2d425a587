"""A saturated server whose KV memory is short: how long the device waits between steps, and what preemption costs.

    python -m benchmarks.saturation                                          SmolLM2 on the CPU
    python -m benchmarks.saturation --device cuda --config r1-1.5b

Each client sends its next request when its last one has ended. The device's own times of all steps (CUDA events on a
GPU, the engine thread's clock on the CPU) are taken off the time that passed: the rest it waited between steps. The
recompute tax is the share of computed tokens that were computed once before and lost when their blocks went to others.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from dataclasses import asdict, dataclass

from benchmarks import report
from benchmarks.http_client import ask
from benchmarks.live_traffic import served_model
from benchmarks.metrics_page import Page, read_page
from benchmarks.model_configs import CONFIGS

IDLE_BAR = 0.03
"""On a GPU."""
TAX_BAR = 0.02
CLIENTS = {"cpu": 32, "cuda": 256}
MEMORY = {"cpu": "1100MiB", "cuda": "5.5GiB"}
"""So little that KV runs short: SmolLM2's weights take half of it, those of the 1.5B config 3.1 GiB."""
WARM_UP = {"cpu": 10.0, "cuda": 15.0}
"""Seconds until every client has a stream, and on a GPU until graphs are captured."""


@dataclass(frozen=True, slots=True)
class Load:
    port: int
    clients: int
    prompt: tuple[int, int]
    """Fewest and most tokens."""
    output: tuple[int, int]

    async def keep_busy(self, index: int) -> None:
        """One client that always has a stream open. Raises RuntimeError where a request is refused."""
        chance = random.Random(index)
        while True:
            answer = await ask(self.port, self._body(chance))
            if not answer.complete or answer.status != 200:
                raise RuntimeError(f"a request was not served: {answer.status} {answer.body[:300]!r}")

    def _body(self, chance: random.Random) -> dict[str, object]:
        return {
            "model": "m",
            "prompt": [chance.randrange(10, 10_000) for _ in range(chance.randint(*self.prompt))],
            "max_tokens": chance.randint(*self.output),
            "ignore_eos": True,
            "stream": True,
        }


@dataclass(frozen=True, slots=True)
class Found:
    seconds: float
    steps: int
    idle: float
    """Share of the time in which no step was on the device."""
    preemptions: int
    recompute_tax: float
    kv_blocks: int
    tokens_per_second: float

    @classmethod
    def between(cls, first: Page, last: Page, seconds: float) -> Found:
        def grown(name: str) -> float:
            return last.value(name) - first.value(name)

        return cls(
            seconds=seconds,
            steps=int(grown("step_seconds_count")),
            idle=1 - grown("step_seconds_sum") / seconds,
            preemptions=int(grown("preemptions_total")),
            recompute_tax=grown("recomputed_tokens_total") / max(1.0, grown("computed_tokens_total")),
            kv_blocks=int(last.value("kv_blocks")),
            tokens_per_second=grown("generated_tokens_total") / seconds,
        )


async def measure(load: Load, warm_up: float, seconds: float) -> Found:
    clients = [asyncio.create_task(load.keep_busy(index)) for index in range(load.clients)]
    await asyncio.sleep(warm_up)
    first, began = await read_page(load.port), time.perf_counter()
    await asyncio.sleep(seconds)
    last, ended = await read_page(load.port), time.perf_counter()
    for client in clients:
        if client.done():
            client.result()
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return Found.between(first, last, ended - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--config", choices=list(CONFIGS), default="r1-1.5b", help="shapes on a GPU, random weights")
    parser.add_argument("--clients", type=int, help=f"default: {CLIENTS}")
    parser.add_argument("--memory-limit", help=f"of the model; default: {MEMORY}")
    parser.add_argument("--prompt", type=int, nargs=2, default=(20, 200), metavar=("FEWEST", "MOST"))
    parser.add_argument("--output", type=int, nargs=2, default=(50, 400), metavar=("FEWEST", "MOST"))
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    facts = report.print_header("Saturation with little KV memory")
    on_cpu = arguments.device == "cpu"
    arguments.clients = arguments.clients or CLIENTS[arguments.device]
    arguments.memory_limit = arguments.memory_limit or MEMORY[arguments.device]
    facts["device"] = "cpu" if on_cpu else report.device_name()
    with served_model(arguments.device, arguments.config, memory_limit=arguments.memory_limit) as server:
        load = Load(server.port, arguments.clients, tuple(arguments.prompt), tuple(arguments.output))
        found = asyncio.run(measure(load, WARM_UP[arguments.device], arguments.seconds))
    of_idle = "for comparison" if on_cpu else f"bar {IDLE_BAR:.0%}; ratio {found.idle / IDLE_BAR:.2f}"
    print(f"{found.steps} steps in {found.seconds:.1f} s, {found.tokens_per_second:,.0f} tokens/s")
    print(f"device idle between steps {found.idle:.2%}, {of_idle}")
    print(
        f"recompute tax {found.recompute_tax:.2%}, bar {TAX_BAR:.0%}; ratio {found.recompute_tax / TAX_BAR:.2f} "
        f"({found.preemptions} preemptions, {found.kv_blocks} KV blocks)"
    )
    path = report.write(
        f"saturation_{arguments.device}", {"machine": facts, "load": vars(arguments), "found": asdict(found)}
    )
    print(f"written to {path.relative_to(report.ROOT)}")
    if found.preemptions == 0:
        raise SystemExit("KV memory was never short: a smaller --memory-limit or more --clients")
    if found.recompute_tax > TAX_BAR or (found.idle > IDLE_BAR and not on_cpu):
        raise SystemExit("the bar is missed")


if __name__ == "__main__":
    main()
