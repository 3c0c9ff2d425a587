"""An engine and a scheduler run together without processes: the worker's loop on a clock of the test's own."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from engines.generation.engine import GenerationEngine
from engines.protocol import SamplingParams, TokenLogprobs
from server.scheduler.config import SchedulerConfig
from server.scheduler.core import DynamicBatchScheduler
from server.worker.wire import Item


class Streams:
    """Runs requests to their end and keeps what came out."""

    def __init__(
        self,
        engine: GenerationEngine,
        clock: Callable[[], float] | None = None,
        blocks: int | None = None,
        graphs: bool = True,
        **config: Any,
    ) -> None:
        """``blocks`` lets the scheduler use only so many of the engine's, ``graphs`` those that are captured now."""
        self._engine = engine
        self._capacity = engine.capacity
        if blocks is not None:
            self._capacity = msgspec.structs.replace(engine.capacity, blocks=blocks)
        if not graphs:
            self._capacity = msgspec.structs.replace(self._capacity, graph_rows=(), graph_tokens=())
        self._ticks = 0
        self._clock = clock or self._tick
        self.scheduler = DynamicBatchScheduler(SchedulerConfig(**config))
        self.scheduler.add_engine(engine.info.name, self._capacity, engine.info.fingerprint)
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}
        self.cached: dict[int, int] = {}
        self.logprobs: dict[int, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        self.steps = 0
        self._tickets: deque[int] = deque()

    def _tick(self) -> float:
        self._ticks += 1
        return self._ticks * 1e-3

    def offer(self, items: list[Item]) -> None:
        for item in items:
            self.tokens[item.item] = []
        assert self.scheduler.offer(items, self._clock()) is None

    def step(self) -> bool:
        """One turn of the worker's loop; False when there was nothing to do."""
        engine = self._engine
        plan = self.scheduler.plan(self._clock(), {engine.info.name: self._capacity})
        if plan is not None:
            self._tickets.append(engine.launch(plan))
        if not self._tickets:
            return False
        if plan is None or len(self._tickets) == 2:
            self._settle()
        return True

    def _settle(self) -> None:
        self.steps += 1
        for update in self.scheduler.settle(self._engine.collect(self._tickets.popleft()), self._clock()):
            assert update.first_index == len(self.tokens[update.item])
            self.tokens[update.item] += update.tokens
            if update.end:
                self.ends[update.item] = update.end
            self.logprobs.setdefault(update.item, []).extend(update.logprobs)
            self.prompt_logprobs.setdefault(update.item, []).extend(update.prompt_logprobs)
            if update.cached_tokens:
                self.cached[update.item] = update.cached_tokens

    def run(self) -> None:
        while self.step():
            pass
        assert self.scheduler.integrity() == []
        (load,) = self.scheduler.load()
        assert (load.running, load.waiting, load.blocks_used) == (0, 0, 0)


def item(number: int, prompt: list[int], max_tokens: int, engine: str = "tiny", **sampling: Any) -> Item:
    return Item(
        item=number,
        request=number,
        engine=engine,
        tokens=list(prompt),
        prompt_length=len(prompt),
        max_tokens=max_tokens,
        sampling=SamplingParams(**{"seed": number} | sampling),
    )


def mixed_items(count: int, vocab: int, rng: random.Random, longest: int = 60) -> list[Item]:
    """Requests of mixed lengths and settings, of which some share a beginning."""
    beginnings = [[rng.randrange(vocab) for _ in range(40)] for _ in range(2)]
    settings: list[dict[str, Any]] = [
        {"temperature": 0},
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 20, "min_p": 0.02, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.3, "logprobs": 2, "min_tokens": 5, "stop_token_ids": (1, 2, 3)},
    ]
    items = []
    for number in range(count):
        prompt = [rng.randrange(vocab) for _ in range(rng.randrange(1, longest))]
        if rng.random() < 0.5:
            prompt = rng.choice(beginnings) + prompt[:20]
        items.append(item(number, prompt, rng.randrange(1, 30), **rng.choice(settings)))
    return items
