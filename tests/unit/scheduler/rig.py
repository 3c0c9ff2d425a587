"""The real scheduler and fake engines in one thread, under a clock that moves only when told to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from engines.fake import FakeEngine, fake_logprobs, fake_output, fake_token
from engines.protocol import Capacity, End, Irregular, SamplingParams, StepPlan, StepResult
from server.scheduler.config import SchedulerConfig
from server.scheduler.core import Dropped, DynamicBatchScheduler, ItemUpdate
from server.scheduler.law import Law
from server.worker.wire import EngineLoad, Item

SMALL = Capacity(blocks=64, block_size=4, max_rows=8, max_step_tokens=64, max_model_len=128)
VOCAB = 50

_encoder = msgspec.msgpack.Encoder()
_plans = msgspec.msgpack.Decoder(StepPlan)


def round_trip(plan: StepPlan) -> StepPlan:
    """The plan as another process would read it."""
    return _plans.decode(_encoder.encode(plan))


@dataclass
class Stream:
    """What the client of one item has heard."""

    item: Item
    tokens: list[int] = field(default_factory=list)
    end: End = ""
    updates: list[ItemUpdate] = field(default_factory=list)
    cancelled: bool = False
    dropped: Dropped | None = None

    def take(self, update: ItemUpdate) -> None:
        assert not self.end, f"item {update.item} ended twice"
        assert not self.cancelled, f"item {update.item} was cancelled"
        assert not self.dropped, f"item {update.item} was dropped"
        assert update.tokens or update.end, "an update without news"
        replayed = len(self.item.tokens) - self.item.prompt_length
        assert update.first_index == replayed + len(self.tokens) or update.output
        self.tokens += update.tokens
        self.end = update.end
        self.updates.append(update)


def expected(item: Item, capacity: Capacity) -> tuple[list[int], End]:
    """Tokens that the item must hear and how it must end, from the definition of the fake engine alone."""
    tokens: list[int] = []
    room = capacity.blocks * capacity.block_size + 1
    limit = min(item.prompt_length + item.max_tokens, capacity.max_model_len)
    position = len(item.tokens) - item.prompt_length
    while item.prompt_length + position < min(limit, room):
        tokens.append(fake_token(item.sampling.seed, item.sampling.choice, position, VOCAB))
        position += 1
        if tokens[-1] in item.sampling.stop_token_ids and position > item.sampling.min_tokens:
            return tokens, "stop"
    return tokens, "length" if limit <= room else "error"


def check_logprobs(stream: Stream) -> None:
    """One entry for each token and for each prompt token after the first, each exactly once, where asked for."""
    item = stream.item
    best = item.sampling.logprobs
    given = [entry for update in stream.updates for entry in update.logprobs]
    assert given == ([] if best is None else [fake_logprobs(token, best, VOCAB) for token in stream.tokens])
    best = None if len(item.tokens) > item.prompt_length else item.prompt_logprobs
    given = [entry for update in stream.updates for entry in update.prompt_logprobs]
    scored = item.tokens[1:] if best is not None and stream.updates else []
    assert given == [fake_logprobs(token, best or 0, VOCAB) for token in scored]


class Rig:
    """``seconds`` gives the device time of a plan; by default each step takes a hundredth."""

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        engines: Mapping[str, Capacity] | None = None,
        seconds: Callable[[StepPlan], float] = lambda plan: 0.01,
        law: Law | None = None,
    ) -> None:
        self.now = 100.0
        self.scheduler = DynamicBatchScheduler(config or SchedulerConfig(), law)
        self.capacities = dict(engines or {"m": SMALL})
        self.engines = {name: FakeEngine(name, capacity, vocab=VOCAB) for name, capacity in self.capacities.items()}
        for name, capacity in self.capacities.items():
            self.scheduler.add_engine(name, capacity, f"fingerprint of {name}")
        self.streams: dict[int, Stream] = {}
        self.plans: list[StepPlan] = []
        self.dropped: list[Dropped] = []
        self.in_flight: deque[StepPlan] = deque()
        self._seconds = seconds
        self._requests = 0

    def item(self, prompt: Sequence[int], max_tokens: int = 8, **fields: object) -> Item:
        """A request of one item; ``fields`` are those of Item and SamplingParams."""
        return self.group(prompt, 1, max_tokens, **fields)[0]

    def group(self, prompt: Sequence[int], n: int, max_tokens: int = 8, **fields: object) -> list[Item]:
        """A request of ``n`` items that differ in their choice only."""
        self._requests += 1
        sampling = {key: fields.pop(key) for key in SamplingParams.__struct_fields__ if key in fields}
        common = {"engine": "m", "tokens": list(prompt), "prompt_length": len(prompt), "max_tokens": max_tokens}
        return [
            msgspec.convert(
                common
                | fields
                | {
                    "item": self._requests * 1000 + choice,
                    "request": self._requests,
                    "sampling": {"seed": self._requests, "choice": choice} | sampling,
                },
                Item,
            )
            for choice in range(n)
        ]

    def one_shot(self, bucket: int, rows: int) -> Item:
        return self.item([], 0, bucket=bucket, rows=rows)

    def offer(self, *items: Item) -> None:
        """Offer one request that must be taken."""
        assert self.scheduler.offer(list(items), self.now) is None
        self.accepted(items)

    def accepted(self, items: Sequence[Item]) -> None:
        self.streams.update((item.item, Stream(item)) for item in items)

    def cancel(self, *items: int) -> None:
        self.scheduler.cancel(items)
        for item in items:
            if item in self.streams and not self.streams[item].end:
                self.streams[item].cancelled = True

    def launch(self) -> StepPlan | None:
        """Plan and launch one step, if there is one."""
        plan = self.scheduler.plan(self.now, self.capacities)
        self.hear_dropped()
        if plan is not None:
            assert round_trip(plan) == plan
            assert self.engines[plan.engine].launch(round_trip(plan)) == plan.step
            self.in_flight.append(plan)
            self.plans.append(plan)
        return plan

    def hear_dropped(self) -> None:
        for dropped in self.scheduler.dropped():
            self.dropped.append(dropped)
            for item in dropped.items:
                stream = self.streams[item]
                assert not stream.tokens, f"item {item} was dropped after its first token"
                assert not stream.end
                assert not stream.dropped
                stream.dropped = dropped

    def must_launch(self) -> StepPlan:
        plan = self.launch()
        assert plan is not None
        return plan

    def settle(self, irregular: Irregular = "") -> list[ItemUpdate]:
        """Collect and settle the oldest step in flight."""
        plan = self.in_flight.popleft()
        result = self.engines[plan.engine].collect(plan.step)
        return self.hear(msgspec.structs.replace(result, seconds=self._seconds(plan), irregular=irregular))

    def hear(self, result: StepResult) -> list[ItemUpdate]:
        self.now += result.seconds
        updates = self.scheduler.settle(result, self.now)
        for update in updates:
            self.streams[update.item].take(update)
        return updates

    def tick(self) -> bool:
        """One round of the worker's loop; False where there was nothing to do."""
        plan = self.launch()
        if len(self.in_flight) == 2 or (plan is None and self.in_flight):
            self.settle()
            return True
        return plan is not None

    def run(self, most: int = 100_000) -> None:
        """Until nothing is left to do; fails where that takes more than ``most`` rounds."""
        for _ in range(most):
            if not self.tick():
                due = self.scheduler.due()
                if due is None:
                    return
                self.now = due
        raise AssertionError("the scheduler does not come to an end")

    def check(self) -> None:
        assert self.scheduler.integrity() == []

    def check_all(self) -> None:
        """After ``run``: every stream is what it has to be, and nothing is held any more."""
        self.check()
        for stream in self.streams.values():
            self.check_stream(stream)
        for load in self.scheduler.load():
            assert (load.running, load.waiting, load.waiting_tokens, load.blocks_used) == (0, 0, 0, 0)

    def check_stream(self, stream: Stream) -> None:
        if stream.dropped:
            return
        if stream.item.rows:
            ends = [(update.end, update.output) for update in stream.updates]
            output = fake_output(stream.item.item, stream.item.bucket, stream.item.rows)
            assert ends == ([] if stream.cancelled else [("stop", output)])
            return
        tokens, end = expected(stream.item, self.capacities[stream.item.engine])
        check_logprobs(stream)
        if stream.cancelled:
            assert not stream.end
            assert stream.tokens == tokens[: len(stream.tokens)]
        else:
            assert (stream.tokens, stream.end) == (tokens, end), f"item {stream.item.item}"

    def load(self, name: str = "m") -> EngineLoad:
        return next(load for load in self.scheduler.load() if load.name == name)


def shape(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    """(start, count, max_new) of each row."""
    assert plan is not None
    return [(row.start, row.count, row.max_new) for row in plan.rows]


def with_capacity(config: SchedulerConfig | None = None, **fields: object) -> Rig:
    return Rig(config, {"m": msgspec.structs.replace(SMALL, **fields)})
