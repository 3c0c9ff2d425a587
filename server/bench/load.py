"""A load as the user describes it: where to, how many requests of which lengths, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from server.bench import arrivals
from server.bench.arrivals import ANY_LENGTH, Lengths
from server.bench.connection import Address
from server.bench.run import Target, run_load
from server.bench.summary import METRICS, Summary, summarize
from server.bench.wire import Ask, PromptKind
from server.errors import CommandFailed, UsageError
from server.settings import parse_duration

DEFAULT_INPUTS, DEFAULT_OUTPUTS = Lengths(256, 768), Lengths(64, 320)
PROBE_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Which requests are made in a run. Exactly one of ``rate`` without trace, ``trace``, ``concurrency`` rules."""

    requests: int
    inputs: Lengths
    outputs: Lengths
    rate: float | None = None
    """Requests per second."""
    concurrency: int | None = None
    trace: Sequence[Ask] = ()
    trace_name: str = ""

    def asks(self, seed: int) -> list[Ask]:
        if self.trace:
            return arrivals.replay(self.trace, self.requests, self.rate, self.inputs, self.outputs, seed)
        if self.rate is not None:
            return arrivals.poisson(self.requests, self.rate, self.inputs, self.outputs, seed)
        return arrivals.all_at_once(self.requests, self.inputs, self.outputs, seed)

    def describe(self) -> str:
        at_rate = "" if self.rate is None else f" at {self.rate:g} a second"
        if self.trace:
            return f"{self.requests} requests of {self.trace_name}{at_rate}"
        lengths = f"{self.inputs} tokens in, {self.outputs} out"
        if self.concurrency is not None:
            return f"{self.requests} requests over {self.concurrency} streams, {lengths}"
        return f"{self.requests} requests{at_rate} (Poisson), {lengths}"

    def settings(self) -> dict[str, object]:
        """For the record."""
        return {
            "requests": self.requests,
            "rate": self.rate,
            "concurrency": self.concurrency,
            "trace": self.trace_name or None,
            "input": str(self.inputs),
            "output": str(self.outputs),
        }


def choose_load(
    *,
    rate: float | None,
    trace: Path | None,
    concurrency: int | None,
    requests: int,
    inputs: str | None,
    outputs: str | None,
) -> Load:
    """Raises UsageError for options that do not go together."""
    if concurrency is not None and (rate is not None or trace is not None):
        raise UsageError("--concurrency is a closed loop; it does not go with --rate or --trace")
    if rate is None and trace is None and concurrency is None:
        raise UsageError("say how requests come: --rate 8, --trace FILE or --concurrency 64")
    asks = arrivals.read_trace(trace) if trace is not None else []
    unset_inputs, unset_outputs = (ANY_LENGTH, ANY_LENGTH) if asks else (DEFAULT_INPUTS, DEFAULT_OUTPUTS)
    return Load(
        requests=requests,
        inputs=Lengths.parse(inputs, "--input") if inputs else unset_inputs,
        outputs=Lengths.parse(outputs, "--output") if outputs else unset_outputs,
        rate=rate,
        concurrency=concurrency,
        trace=asks,
        trace_name=trace.name if trace is not None else "",
    )


def parse_slo(text: str) -> dict[str, float]:
    """``ttft=200ms,tpot=15ms`` to most seconds by metric. Raises UsageError."""
    targets: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        metric, _, value = part.partition("=")
        if metric not in METRICS:
            raise UsageError(f"--slo {part}: targets are {', '.join(METRICS)}, such as ttft=200ms,tpot=15ms")
        targets[metric] = seconds(value, f"--slo {part}")
    return targets


def seconds(text: str, option: str) -> float:
    """``200ms`` or ``2s`` to seconds. Raises UsageError."""
    try:
        value = parse_duration(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None
    assert isinstance(value, float)
    return value


def find_target(url: str, model: str | None, api_key: str | None, **request: Any) -> Target:
    """The server's routes and its model, after one small request that must succeed. ``request``: see ``Target``.

    Raises UsageError for a URL that is none, CommandFailed where the server does not answer as it should.
    """
    base = url.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    try:
        Address.parse(base)
    except ValueError as error:
        raise UsageError(str(error)) from None
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    with httpx.Client(headers=headers, timeout=PROBE_TIMEOUT) as client:
        try:
            name = model or _first_model(client, base)
            target = Target(url=base, model=name, api_key=api_key, **request)
            _probe(client, target)
        except httpx.HTTPError as error:
            raise CommandFailed(f"no server answers at {base} ({type(error).__name__})") from error
    return target


def _first_model(client: httpx.Client, base: str) -> str:
    answer = client.get(f"{base}/models")
    try:
        return str(answer.json()["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise CommandFailed(f"{base}/models names no model ({answer.status_code}); give one with --model") from None


def _probe(client: httpx.Client, target: Target) -> None:
    body: dict[str, object] = {"model": target.model, "max_tokens": 1, "temperature": target.temperature}
    route, prompt = _small_prompt(target.prompt, target.vocab)
    answer = client.post(target.url + route, json=body | prompt | ({"ignore_eos": True} if target.ignore_eos else {}))
    if answer.status_code != 200:
        raise CommandFailed(f"the server refuses a request: {answer.status_code} {answer.text[:500]}")


def _small_prompt(kind: PromptKind, vocab: int) -> tuple[str, dict[str, object]]:
    if kind == "chat":
        return "/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}
    return "/completions", {"prompt": [vocab - 1, vocab - 2] if kind == "ids" else "hello"}


def measure(
    target: Target,
    load: Load,
    seed: int,
    *,
    clients: int,
    slo: dict[str, float],
    on_progress: Callable[[int], None] = lambda ended: None,
) -> tuple[Summary | None, bool]:
    """One run. The summary is None where no request had ended when Ctrl-C, which the flag tells of, came.

    Raises CommandFailed when a client process dies, UsageError where a trace is too short.
    """
    gathered = run_load(
        target, load.asks(seed), clients=clients, concurrency=load.concurrency or 0, on_progress=on_progress
    )
    if not gathered.outcomes:
        return None, gathered.interrupted
    open_loop = load.concurrency is None
    summary = summarize(gathered.outcomes, gathered.healths, seed=seed, slo=slo, open_loop=open_loop)
    return summary, gathered.interrupted
