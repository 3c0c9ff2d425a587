"""Sends a run's requests to a real server at their times, from several processes, and times what comes back."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from benchmarks.simulation.run import Outcome
from benchmarks.simulation.workload import SimulatedRequest


def lead(processes: int) -> float:
    """Seconds before the first arrival in which the client processes get ready."""
    return 1.0 + 0.5 * processes


@dataclass(frozen=True, slots=True)
class _Share:
    """What one client process does."""

    url: str
    model: str
    vocabulary: int
    requests: Sequence[SimulatedRequest]
    began: float
    """Of the monotonic clock, which all processes of a machine share."""
    nonce: int
    aims: bool


def drive(
    url: str,
    model: str,
    vocabulary: int,
    requests: Sequence[SimulatedRequest],
    *,
    processes: int,
    nonce: int,
    aims: bool = True,
) -> list[Outcome]:
    """Outcomes in the order of ``requests``; ``nonce`` makes prompts that no earlier drive has sent, and ``aims`` tells
    the server their targets.

    Raises RuntimeError where the server answers with anything but a stream or a refusal.
    """
    began = time.monotonic() + lead(processes)
    shares = [
        _Share(url, model, vocabulary, requests[first::processes], began, nonce, aims) for first in range(processes)
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        outcomes = [outcome for part in pool.map(_drive_share, shares) for outcome in part]
    return sorted(outcomes, key=lambda outcome: outcome.request.number)


def _drive_share(share: _Share) -> list[Outcome]:
    return asyncio.run(_send_all(share))


async def _send_all(share: _Share) -> list[Outcome]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        await client.get(f"{share.url}/health/live")
        return list(await asyncio.gather(*(_send(client, share, request) for request in share.requests)))


async def _send(client: httpx.AsyncClient, share: _Share, request: SimulatedRequest) -> Outcome:
    outcome = Outcome(request)
    body = _body(share, request)
    await asyncio.sleep(share.began + request.arrival - time.monotonic())
    async with client.stream("POST", f"{share.url}/v1/completions", json=body) as response:
        if response.status_code == 503:
            outcome.refused = True
            return outcome
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()[:500]}")
        async for chunk in response.aiter_raw():
            _hear(outcome, chunk, time.monotonic() - share.began)
    if outcome.first is None:
        outcome.refused = True  # by an event of the open stream, after its first keep-alive
    outcome.tokens = request.output
    return outcome


def _hear(outcome: Outcome, chunk: bytes, now: float) -> None:
    """Only events with text move the clock; one may hold several tokens."""
    if b'"text":"' in chunk:
        outcome.heard(1, now)


def _body(share: _Share, request: SimulatedRequest) -> dict[str, object]:
    # Distinct from the first token on, so that the prefix cache finds nothing.
    first = 10 + (share.nonce * 100_003 + request.number * 7) % (share.vocabulary - 20)
    step = 1 + request.number % 97
    targets = request.targets
    aims = {"slo": {"ttft_ms": targets.first_token(request.prompt) * 1000, "tpot_ms": targets.tpot * 1000}}
    return {
        "model": share.model,
        "prompt": [10 + (first + step * index) % (share.vocabulary - 20) for index in range(request.prompt)],
        "max_tokens": request.output,
        "temperature": 0.6,
        "ignore_eos": True,
        "stream": True,
        "priority": request.priority,
    } | (aims if share.aims else {})
