"""Start-up by phase: from process start to the first token that an HTTP client receives.

    python -m benchmarks.startup r1-1.5b                      # one model; engine_speed --start does the same

Writes a real safetensors folder (random weights, in shards, with a tokenizer), so that its pages are in the page cache,
and runs ``slimserve serve`` on it twice: with an empty SLIMSERVE_HOME (cold kernel cache), then with the same one again
(warm). Times are seconds from the start of the process. Kernels are compiled under SLIMSERVE_HOME alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import torch
from safetensors.torch import save_file

from benchmarks.model_configs import CONFIGS, MODEL_LEN, config_folder
from benchmarks.servers import free_port, slimserve
from engines.manifest import read_manifest
from engines.models.config import parse_config
from engines.models.loader import build_model
from engines.models.weights import CountingSource, Placement
from server.text.generated_tokenizer import generate_text

SHARD_BYTES = 1 << 30
PATIENCE = 600.0
POLL = 0.005
BARS = {"cold": 25.0, "warm": 10.0}
"""Seconds to the first token, at most, for the 1.5B on a GPU."""
BARRED = "r1-1.5b"
PROMPT = "The first token of this answer ends the measurement."


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds from the start of the process; None for a phase that was not seen."""

    first_line: float
    """The command runs and says so."""
    http_bound: float
    """Its port takes connections."""
    weights_read: float | None
    ready: float
    first_token: float
    """The first event with text is at the client, which asked as soon as the server was ready."""
    worker: dict[str, float]
    """How long each part of the worker's start took, by its log; ``before`` is what passed until its process began."""


def write_model(parent: Path, model: str) -> Path:
    """A folder as a hub holds it: config, tokenizer, shards of bfloat16 weights and their index."""
    folder = config_folder(parent, model)
    manifest = read_manifest(folder, random_weights=True)
    names = CountingSource(Placement(device=torch.device("meta"), dtype=torch.bfloat16))
    build_model(parse_config(manifest), names, positions=1)
    # A generated tokenizer has one id beyond its vocabulary, for what it cannot express.
    text = generate_text(msgspec.structs.replace(manifest, vocab_size=manifest.vocab_size - 1))
    text.tokenizer.save(str(folder / "tokenizer.json"))
    # Equal numbers in many places cost as much to read as different ones, and take seconds less to make.
    numbers = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, shape in names.shapes.items():
        tensor = _tensor(name, shape, numbers)
        if filled and filled + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file)
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def _tensor(name: str, shape: tuple[int, ...], numbers: torch.Tensor) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=numbers.dtype)
    count = math.prod(shape)
    return numbers.repeat(-(-count // numbers.numel()))[:count].view(shape)


class _Watched:
    """A server whose output lines are kept with the time at which they came."""

    def __init__(self, process: subprocess.Popen[str], started: float) -> None:
        self._process = process
        self._started = started
        self._lines: queue.SimpleQueue[tuple[float, str] | None] = queue.SimpleQueue()
        self.seen: list[tuple[float, str]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def wait_line(self, found: Callable[[str], bool]) -> float:
        """Raises RuntimeError with the output where the server ends first, or says nothing for long."""
        while True:
            try:
                line = self._lines.get(timeout=PATIENCE)
            except queue.Empty:
                line = None
            if line is None:
                raise RuntimeError("slimserve did not start:\n" + "".join(text for _, text in self.seen[-30:]))
            self.seen.append(line)
            if found(line[1]):
                return line[0]

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put((time.perf_counter() - self._started, line))
        self._lines.put(None)


@contextmanager
def _serving(folder: Path, home: Path, port: int) -> Iterator[tuple[_Watched, float]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_CACHE_DIR"}
    env |= {"SLIMSERVE_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    command = slimserve("serve", str(folder), "--port", str(port), "--max-model-len", str(MODEL_LEN))
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        try:
            yield _Watched(process, started), started
        finally:
            process.terminate()


def measure_start(folder: Path, home: Path, log: Path | None = None) -> Phases:
    """``log`` gets what the server said, with times. Raises RuntimeError where it does not start or answer."""
    port = free_port()
    name = folder.name
    with _serving(folder, home, port) as (server, started):
        bound: queue.SimpleQueue[float] = queue.SimpleQueue()
        threading.Thread(target=_wait_bound, args=(port, started, bound), daemon=True).start()
        server.wait_line(lambda line: line.startswith("ready: "))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
            first_token = _first_event(client, name) - started
        if log is not None:
            log.write_text("".join(f"{seconds:7.3f} {line}" for seconds, line in server.seen))
        return Phases(
            first_line=server.seen[0][0],
            http_bound=bound.get(timeout=PATIENCE),
            weights_read=_weights_read(server.seen, name),
            ready=server.seen[-1][0],
            first_token=first_token,
            worker=worker_phases(server.seen, name),
        )


def _wait_bound(port: int, started: float, bound: queue.SimpleQueue[float]) -> None:
    deadline = started + PATIENCE
    while time.perf_counter() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                break
        except OSError:
            time.sleep(POLL)
    bound.put(time.perf_counter() - started)


def _first_event(client: httpx.Client, model: str) -> float:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                if response.status_code != 200 or '"error"' in line:
                    raise RuntimeError(f"slimserve refused the first request: {line}")
                return time.perf_counter()
    raise RuntimeError(f"slimserve answered {response.status_code} without a token")


def _weights_read(lines: list[tuple[float, str]], model: str) -> float | None:
    """When the phase after the one that read the weights began."""
    phases = [(seconds, line) for seconds, line in lines if line.startswith(f"{model}: ")]
    reading = [index for index, (_, line) in enumerate(phases) if "reading weights" in line]
    if not reading or reading[-1] + 1 == len(phases):
        return None
    return phases[reading[-1] + 1][0]


def worker_phases(lines: list[tuple[float, str]], model: str) -> dict[str, float]:
    """Of the worker's line ``MODEL: loaded in 7.90 s: interpreter 0.20, libraries 2.10, ...``, seconds by phase."""
    pattern = re.compile(rf"{re.escape(model)}: loaded in ([\d.]+) s: (.+)")
    for seconds, line in lines:
        if found := pattern.search(line):
            parts = (part.rpartition(" ") for part in found[2].strip().split(", "))
            before = {"before": round(seconds - float(found[1]), 2)}
            return before | {name: float(took) for name, _, took in parts}
    return {}


def show(model: str, kind: str, phases: Phases) -> None:
    def seconds(value: float | None) -> str:
        return "   -" if value is None else f"{value:5.2f} s"

    times = {name: value for name, value in asdict(phases).items() if name != "worker"}
    parts = (f"{name.replace('_', ' ')} {seconds(value)}" for name, value in times.items())
    line = f"{model} start, {kind} kernel cache: " + ", ".join(parts)
    if model == BARRED and torch.cuda.is_available():
        line += f"; bar <= {BARS[kind]:.0f} s: " + ("met" if phases.first_token <= BARS[kind] else "MISSED")
    print(line, flush=True)
    if phases.worker:
        print("  worker: " + ", ".join(f"{name} {took:.2f}" for name, took in phases.worker.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(CONFIGS))
    parser.add_argument("--output", type=Path, help="file for the figures as JSON")
    parser.add_argument("--logs", type=Path, help="folder for what the servers say, with times")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        folder = write_model(Path(parent), arguments.model)
        for file in folder.glob("*.safetensors"):  # the page cache may have let go of what was written first
            with file.open("rb") as opened:
                while opened.read(1 << 24):
                    pass
        home = Path(parent) / "home"
        home.mkdir()
        result: dict[str, Any] = {}
        for kind in BARS:
            log = None if arguments.logs is None else arguments.logs / f"serve-{arguments.model}-{kind}.log"
            phases = measure_start(folder, home, log)
            show(arguments.model, kind, phases)
            result[kind] = asdict(phases)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
