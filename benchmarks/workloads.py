"""The columns of the speed tables: how many requests of which lengths come at once."""

from __future__ import annotations

import random
from dataclasses import dataclass

OUTPUT_TEMPERATURE = 0.6


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that all come at once; lengths in tokens, one entry a request. EOS is ignored."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    repeats: int
    """Runs after one warm-up run, of which the median counts."""

    @property
    def counted_tokens(self) -> int:
        """Tokens that the rate counts: outputs, and where the prompts are the work all of them."""
        return sum(self.outputs) + (sum(self.inputs) if self.name == "prefill" else 0)

    def prompts(self, vocab: int, randomness: random.Random) -> list[list[int]]:
        """Random token ids of these lengths: fresh ones share no prefix with any earlier prompt."""
        return [[randomness.randrange(vocab) for _ in range(length)] for length in self.inputs]


def _batch(rows: int, prompt: int, output: int) -> Workload:
    return Workload(f"b{rows}", (prompt,) * rows, (output,) * rows, repeats=5)


def _mix() -> Workload:
    """Inputs are drawn first, then outputs, from the generator that the peers' figures were taken with."""
    randomness = random.Random(0)
    inputs = tuple(randomness.randint(100, 1024) for _ in range(256))
    return Workload("mix", inputs, tuple(randomness.randint(100, 1024) for _ in range(256)), repeats=3)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        _batch(1, 128, 256),
        *(_batch(rows, 512, 128) for rows in (8, 32, 64, 128, 256)),
        _mix(),
        Workload("prefill", (2048,) * 32, (1,) * 32, repeats=3),
    )
}
