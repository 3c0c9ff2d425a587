"""When requests come and how long they are: Poisson, a trace, or as fast as a fixed number of streams takes them."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from server.bench.wire import Ask
from server.errors import UsageError

LONGEST = 1 << 20
_LENGTHS = re.compile(r"(\d{1,7})(?:-(\d{1,7}))?")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens, drawn uniformly between both ends, which are included."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str, option: str) -> Lengths:
        """``512`` or ``256-768``. Raises UsageError."""
        match = _LENGTHS.fullmatch(text.strip())
        lengths = cls(int(match[1]), int(match[2] or match[1])) if match else cls(0, 0)
        if not 1 <= lengths.least <= lengths.most <= LONGEST:
            raise UsageError(f"{option} {text}: lengths are a number of tokens (512) or a range of them (256-768)")
        return lengths

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"

    def draw(self, randomness: random.Random) -> int:
        return randomness.randint(self.least, self.most)

    def clip(self, length: int) -> int:
        return min(max(length, self.least), self.most)


ANY_LENGTH = Lengths(1, LONGEST)


def poisson(requests: int, rate: float, inputs: Lengths, outputs: Lengths, seed: int) -> list[Ask]:
    """An open loop: gaps between requests are exponential with mean ``1 / rate`` seconds."""
    randomness = random.Random(seed)
    asks, at = [], 0.0
    for _ in range(requests):
        at += randomness.expovariate(rate)
        asks.append(Ask(at, inputs.draw(randomness), outputs.draw(randomness)))
    return asks


def all_at_once(requests: int, inputs: Lengths, outputs: Lengths, seed: int) -> list[Ask]:
    """For a closed loop, which takes them as its streams get free."""
    randomness = random.Random(seed)
    return [Ask(0.0, inputs.draw(randomness), outputs.draw(randomness)) for _ in range(requests)]


def replay(
    trace: Sequence[Ask], requests: int, rate: float | None, inputs: Lengths, outputs: Lengths, seed: int
) -> list[Ask]:
    """A window of the trace that begins at a place drawn from ``seed``, its lengths clipped.

    At the trace's own times, or with these stretched so that the mean rate is ``rate``. Raises UsageError where the
    trace is shorter than ``requests``.
    """
    if requests > len(trace):
        raise UsageError(f"the trace holds {len(trace)} requests; ask for as many at most with --requests")
    first = random.Random(seed).randint(0, len(trace) - requests)
    window = trace[first : first + requests]
    start, length = window[0].at, window[-1].at - window[0].at
    scale = 1.0
    if rate is not None and length > 0:
        scale = (requests - 1) / rate / length
    return [
        Ask((ask.at - start) * scale, inputs.clip(ask.input_tokens), outputs.clip(ask.output_tokens)) for ask in window
    ]


def read_trace(path: Path) -> list[Ask]:
    """Requests in the order of their times, of which the first is 0.

    A .csv file has the columns TIMESTAMP, ContextTokens and GeneratedTokens (Azure's traces), a .jsonl file objects
    with timestamp in milliseconds, input_length and output_length (Mooncake's). Raises UsageError.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                asks = [_of_csv(row) for row in csv.DictReader(file)]
            elif path.suffix == ".jsonl":
                asks = [_of_json(json.loads(line)) for line in file if line.strip()]
            else:
                raise UsageError(f"{path.name}: a trace is a .csv or a .jsonl file")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--trace: {path.name} cannot be read") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--trace: {path.name} does not have the fields of a trace ({error})") from error
    if not asks:
        raise UsageError(f"--trace: {path.name} is empty")
    asks.sort(key=lambda ask: ask.at)
    return [Ask(ask.at - asks[0].at, ask.input_tokens, ask.output_tokens) for ask in asks]


def _of_csv(row: dict[str, str]) -> Ask:
    at = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
    return Ask(at, max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"])))


def _of_json(entry: dict[str, float]) -> Ask:
    return Ask(entry["timestamp"] / 1000, max(1, int(entry["input_length"])), max(1, int(entry["output_length"])))
