"""The worker's loop around one engine: plan, launch, collect, settle."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from engines.protocol import Capacity, End, Engine, SamplingParams, StepPlan, TokenLogprobs
from server.scheduler.config import SchedulerConfig
from server.scheduler.core import DynamicBatchScheduler
from server.worker.wire import Item

_steps = itertools.count(1)
_items = itertools.count(1)
_encoder = msgspec.msgpack.Encoder()
_plans = msgspec.msgpack.Decoder(StepPlan)


@dataclass
class Heard:
    """All that came of one item."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached_tokens: int = 0
    end: End = ""


def make_items(prompt: Sequence[int], n: int = 1, max_tokens: int = 6, **fields: object) -> list[Item]:
    """One request of ``n`` items; ``fields`` are those of Item and SamplingParams."""
    sampling = {"seed": 1} | {key: fields.pop(key) for key in SamplingParams.__struct_fields__ if key in fields}
    first = next(_items)
    ids = [first, *(next(_items) for _ in range(n - 1))]
    common: dict[str, object] = {"engine": "m", "request": first, "tokens": list(prompt)}
    common |= {"prompt_length": len(prompt), "max_tokens": max_tokens} | fields
    choices = ({"item": item, "sampling": {"choice": choice} | sampling} for choice, item in enumerate(ids))
    return [msgspec.convert(common | choice, Item) for choice in choices]


class Loop:
    """One scheduler over the engine. ``capacity`` may be less than the engine has: that makes blocks or rows scarce.

    Every plan is encoded and decoded on its way, so nothing reaches the engine but what a plan says.
    """

    def __init__(self, engine: Engine, config: SchedulerConfig | None = None, **capacity: int) -> None:
        self.engine = engine
        self.scheduler = DynamicBatchScheduler(config or SchedulerConfig())
        self.capacity: Capacity = msgspec.structs.replace(engine.capacity, **capacity)
        self.scheduler.add_engine("m", self.capacity, engine.info.fingerprint)
        self.heard: dict[int, Heard] = {}
        self.plans: list[StepPlan] = []
        self.in_flight: deque[tuple[int, int]] = deque()

    def offer(self, items: list[Item]) -> list[Heard]:
        assert self.scheduler.offer(items, 0.0) is None
        heard = [Heard() for _ in items]
        self.heard.update(zip((item.item for item in items), heard, strict=True))
        return heard

    def launch(self) -> bool:
        """One step, if there is one to launch."""
        plan = self.scheduler.plan(0.0, {"m": self.capacity})
        if plan is None:
            return False
        self.plans.append(plan)
        # Steps rise over the engine's life; each loop has a scheduler of its own, which counts from one.
        sent = _plans.decode(_encoder.encode(msgspec.structs.replace(plan, step=next(_steps))))
        assert self.engine.launch(sent) == sent.step
        self.in_flight.append((plan.step, sent.step))
        return True

    def settle(self) -> None:
        """Collect and settle the oldest step in flight."""
        step, ticket = self.in_flight.popleft()
        result = self.engine.collect(ticket)
        assert result.step == ticket
        assert result.seconds >= 0
        for update in self.scheduler.settle(msgspec.structs.replace(result, step=step), 0.0):
            heard = self.heard[update.item]
            heard.tokens += update.tokens
            heard.logprobs += update.logprobs
            heard.prompt_logprobs += update.prompt_logprobs
            heard.cached_tokens = update.cached_tokens
            heard.end = update.end

    def run(self, depth: int = 2) -> None:
        """To the end, with at most ``depth`` steps in flight."""
        while True:
            launched = len(self.in_flight) < depth and self.launch()
            if not launched and not self.in_flight:
                break
            if not launched or len(self.in_flight) == depth:
                self.settle()
        assert self.scheduler.integrity() == []


def alone(engine: Engine, item: Item) -> Heard:
    """What the item hears when nothing else is there and its prompt is computed in one piece."""
    loop = Loop(engine, SchedulerConfig(prefix_cache=False))
    # An own id, because the item itself may be running in another loop.
    own = msgspec.structs.replace(item, item=next(_items))
    (heard,) = loop.offer([own])
    loop.run(depth=1)
    return heard
