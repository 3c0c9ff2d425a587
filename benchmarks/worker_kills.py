"""Kill or stop the worker under many streams, again and again: is a stream lost or changed, and how long is the pause?

    python -m benchmarks.worker_kills
    python -m benchmarks.worker_kills --signal STOP --rounds 3

Each round asks the same, and kills the worker at a random time while every stream runs. The first round kills nobody:
its texts are what the others must give byte for byte (fp32 on the CPU, temperatures 0 to 1, fixed seeds). A killed
worker must be replaced so soon that the first stream moves again after 10 s, and a stopped one be found within the
server's step timeout, which is set to 5 s for that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import report
from benchmarks.servers import free_port, running, slimserve

WORDS = ("river", "stone", "light", "engine", "paper", "seven", "cloud", "garden", "winter", "music", "table", "clock")
PAUSE_BAR = 10.0
"""Seconds after a kill in which the first stream must move again."""
STEP_TIMEOUT = 5
"""Seconds within which a stopped worker must be found."""
POLL = 0.02
RESULTS = {"KILL": "worker_kills", "STOP": "worker_stops"}


@dataclass(slots=True)
class Answer:
    text: str = ""
    done: bool = False
    error: str = ""
    times: list[float] = field(default_factory=list)
    news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def reaches(self, events: int) -> None:
        """Until so many events have come, or the end."""
        async with self.news:
            await self.news.wait_for(lambda: len(self.times) >= events or self.done or bool(self.error))

    async def tell(self) -> None:
        async with self.news:
            self.news.notify_all()


@dataclass(frozen=True, slots=True)
class Round:
    answers: list[Answer]
    killed_at: float
    """Monotonic seconds; 0 where nobody was killed."""
    found_after: float
    """Seconds until the server was no longer ready, which it is not without its worker; 0 where nobody was killed."""

    def pauses(self) -> list[float]:
        """Of each stream that was open, seconds from the kill until it moved again.

        What was on its way at the kill still arrives: the pause is the longest silence of all streams after it.
        """
        moments = [self.killed_at, *sorted(at for answer in self.answers for at in answer.times if at > self.killed_at)]
        silences = [(later - earlier, later) for earlier, later in pairwise(moments)]
        _, moved = max(silences, default=(0.0, 0.0))
        after = [[at for at in answer.times if at >= moved] for answer in self.answers]
        return [times[0] - self.killed_at for times in after if times and moved]


def ask(index: int, tokens: int) -> dict[str, object]:
    randomness = random.Random(index)
    return {
        "model": "smollm2-135m",
        "prompt": f"Write about {' '.join(randomness.choices(WORDS, k=30))}:",
        "max_tokens": tokens,
        "ignore_eos": True,
        "seed": index,
        "temperature": randomness.choice([0.0, 0.7, 1.0]),
        "stream": True,
    }


async def run_stream(client: httpx.AsyncClient, body: dict[str, object], answer: Answer) -> None:
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer.error = (await response.aread()).decode()
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    answer.done = True
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    answer.error = answer.error or str(event.get("error", ""))
                    answer.text += event["choices"][0]["text"] if "choices" in event else ""
                    answer.times.append(time.monotonic())
                await answer.tell()
    except httpx.HTTPError as error:
        answer.error = repr(error)
    await answer.tell()


def worker_of(server: psutil.Process) -> psutil.Process:
    return next(child for child in server.children() if "server.worker.main" in child.cmdline())


async def time_until_found(url: str, since: float) -> float:
    """Seconds from ``since`` until readiness goes."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        while True:
            if (await client.get("/health/ready")).status_code != 200:
                return time.monotonic() - since
            await asyncio.sleep(POLL)


async def run_round(url: str, server: psutil.Process, streams: int, tokens: int, kill: signal.Signals | None) -> Round:
    """``kill`` is sent once every stream has a token and has not ended."""
    answers = [Answer() for _ in range(streams)]
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        tasks = [
            asyncio.create_task(run_stream(client, ask(index, tokens), each)) for index, each in enumerate(answers)
        ]
        killed_at = found_after = 0.0
        if kill is not None:
            # Events, not seconds: however busy the machine is, the kill falls into the middle of the streams.
            await asyncio.gather(*(answer.reaches(1) for answer in answers))
            wanted = random.randrange(1, max(2, tokens // 2))
            waits = [asyncio.create_task(answer.reaches(wanted)) for answer in answers]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            killed_at = time.monotonic()
            worker_of(server).send_signal(kill)
            found_after = await time_until_found(url, killed_at)
        await asyncio.gather(*tasks)
    return Round(answers, killed_at, found_after)


def faults(reference: Round, disturbed: Round) -> dict[str, int]:
    pairs = list(zip(reference.answers, disturbed.answers, strict=True))
    return {
        "lost": sum(not answer.done or bool(answer.error) for _, answer in pairs),
        "changed": sum(answer.done and answer.text != expected.text for expected, answer in pairs),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    port = free_port()
    command = slimserve("serve", "--port", str(port), "--device", "cpu", "--dtype", "float32")
    log = Path(tempfile.mkdtemp()) / "server.log"
    kill = signal.Signals[f"SIG{arguments.signal}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLIMSERVE_")}
    if kill == signal.SIGSTOP:
        environment["SLIMSERVE_STEP_TIMEOUT"] = str(STEP_TIMEOUT)
    totals = {"lost": 0, "changed": 0}
    first: list[float] = []
    last: list[float] = []
    found_after: list[float] = []
    with running("slimserve", command, port, "/health/ready", env=environment, log=log) as server:
        process = psutil.Process(server.process.pid)
        reference = asyncio.run(run_round(server.url, process, arguments.streams, arguments.tokens, None))
        if not all(answer.done for answer in reference.answers):
            raise SystemExit(f"the undisturbed round failed: {reference.answers[0].error}")
        for number in range(1, arguments.rounds + 1):
            disturbed = asyncio.run(run_round(server.url, process, arguments.streams, arguments.tokens, kill))
            found = faults(reference, disturbed)
            totals = {key: totals[key] + count for key, count in found.items()}
            pauses = disturbed.pauses()
            if not pauses:
                raise SystemExit("every stream had ended before the kill; take more --tokens")
            first.append(min(pauses))
            last.append(max(pauses))
            found_after.append(disturbed.found_after)
            print(
                f"round {number:2}: {found}; found after {found_after[-1]:.2f} s, "
                f"first stream moves after {first[-1]:.2f} s, last {last[-1]:.2f} s",
                flush=True,
            )
    return totals | {
        "rounds": arguments.rounds,
        "streams": arguments.streams,
        "tokens": arguments.tokens,
        "signal": kill.name,
        "found_seconds": {"median": statistics.median(found_after), "max": max(found_after)},
        "first_moves_seconds": {"median": statistics.median(first), "max": max(first)},
        "last_moves_seconds": {"median": statistics.median(last), "max": max(last)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--signal", choices=("KILL", "STOP"), default="KILL")
    arguments = parser.parse_args()
    facts = report.print_header("Killed workers")
    result = run(arguments)
    print(json.dumps(result, indent=1))
    path = report.write(RESULTS[arguments.signal], {"machine": facts, "result": result})
    print(f"written to {path.relative_to(report.ROOT)}")
    if missed := list(missed_bars(result)):
        raise SystemExit("; ".join(missed))


def missed_bars(result: Mapping[str, Any]) -> Iterator[str]:
    """What was promised and did not hold, with the figure."""
    if result["lost"] or result["changed"]:
        yield f"{result['lost']} streams were lost and {result['changed']} changed"
    moved, found = result["first_moves_seconds"]["max"], result["found_seconds"]["max"]
    if result["signal"] == "SIGKILL" and moved > PAUSE_BAR:
        yield f"the first stream moved after {moved:.1f} s, bar {PAUSE_BAR:.0f} s"
    if result["signal"] == "SIGSTOP" and found > STEP_TIMEOUT:
        yield f"the stopped worker was found after {found:.2f} s, bar {STEP_TIMEOUT} s"


if __name__ == "__main__":
    main()
