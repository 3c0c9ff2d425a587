"""Thousands of random steps: arrivals, cancels, shortage, preemption, late ends, groups, two tickets in flight."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engines.fake import fake_token
from engines.protocol import Capacity
from server.scheduler.config import SchedulerConfig
from server.worker.wire import Item
from tests.unit.scheduler.rig import VOCAB, Rig


def random_capacity(rng: random.Random) -> Capacity:
    block_size = rng.choice([1, 2, 4, 8])
    return Capacity(
        blocks=rng.randint(6, 120) // block_size + 2,
        block_size=block_size,
        max_rows=rng.randint(1, 9),
        max_step_tokens=rng.randint(1, 60),
        max_model_len=rng.randint(20, 90),
        graph_rows=rng.choice([(), (1, 2, 4, 8), (3,)]),
    )


def random_config(rng: random.Random) -> SchedulerConfig:
    return SchedulerConfig(
        max_batch=rng.choice([None, None, 1, 3]),
        max_delay=rng.choice([0.0, 0.05]),
        token_budget=rng.choice([None, None, 1, 7]),
        target_ttft=rng.choice([None, 0.2]),
        target_tpot=rng.choice([None, 0.02]),
        prefix_cache=rng.random() < 0.8,
        policy=rng.choice(["adaptive", "adaptive", "adaptive", "aimd", "static"]),
    )


class Traffic:
    """Random arrivals and cancels at one rig."""

    def __init__(self, rng: random.Random, rig: Rig) -> None:
        self.rng = rng
        self.rig = rig
        self.prefixes = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))] for _ in range(4)]
        self.refused = 0

    def arrive(self) -> None:
        rng = self.rng
        if rng.random() < 0.2:
            self.offer([self.rig.item([], 0, bucket=rng.randrange(3), rows=rng.randint(1, 4), **self.wishes())])
            return
        prompt = rng.choice(self.prefixes)[: rng.randint(1, 40)] + [rng.randrange(VOCAB)] * rng.randint(0, 6)
        n = rng.choice([1, 1, 1, 2, 4])
        stops = tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 2, 10])))
        items = self.rig.group(
            prompt,
            n,
            rng.choice([0, 1, 2, 5, 12, 30]),
            engine=rng.choice(sorted(self.rig.capacities)),
            cache_salt=rng.choice(["", "", "tenant"]),
            prompt_logprobs=rng.choice([None, None, None, 2]),
            stop_token_ids=stops,
            min_tokens=rng.choice([0, 0, 3]),
            logprobs=rng.choice([None, None, 0, 2]),
            **self.wishes(),
        )
        self.offer([self.replayed(item) for item in items] if rng.random() < 0.1 else items)

    def wishes(self) -> dict[str, Any]:
        """What the client or the operator wants beside the answer."""
        rng = self.rng
        return {
            "priority": rng.choice(["high", "normal", "normal", "low"]),
            "tenant": rng.choice(["", "a", "b"]),
            "weight": rng.choice([1.0, 3.0]),
            "ttft": rng.choice([None, 0.05, 0.5, 5.0]),
            "tpot": rng.choice([None, 0.001, 0.05]),
            "firm": rng.random() < 0.5,
            "timeout": rng.choice([None, None, 0.3, 10.0]),
            "suspect": rng.random() < 0.05,
        }

    def replayed(self, item: Item) -> Item:
        """The same item as a restarted worker gets it: with some output tokens that exist already."""
        sent = self.rng.randint(0, max(0, item.max_tokens - 1))
        sampling = item.sampling
        tokens = [fake_token(sampling.seed, sampling.choice, position, VOCAB) for position in range(sent)]
        return msgspec.structs.replace(item, tokens=item.tokens + tokens)

    def offer(self, items: list[Item]) -> None:
        if self.rig.scheduler.offer(items, self.rig.now) is None:
            self.rig.accepted(items)
        else:
            self.refused += 1

    def leave(self) -> None:
        if self.rig.streams:
            item = self.rng.choice(list(self.rig.streams))
            request = self.rig.streams[item].item.request
            whole = [item for item, stream in self.rig.streams.items() if stream.item.request == request]
            gone = whole if self.rng.random() < 0.3 else [item]
            self.rig.cancel(*(item for item in gone if not self.rig.streams[item].dropped))


@pytest.mark.parametrize("seed", range(40))
def test_every_item_hears_its_own_stream_and_nothing_leaks(seed: int) -> None:
    rng = random.Random(seed)
    engines = {"m": random_capacity(rng), "other": random_capacity(rng)}
    rig = Rig(random_config(rng), engines, lambda plan: rng.choice([0.001, 0.01, 0.02]))
    traffic = Traffic(rng, rig)
    pressure = rng.choice([0.05, 0.3, 0.6])
    for tick in range(600):
        if rng.random() < pressure:
            traffic.arrive()
        if rng.random() < 0.08:
            traffic.leave()
        if rng.random() < 0.6:
            rig.launch()
        if rig.in_flight and rng.random() < 0.5:
            rig.settle()
        rig.now += rng.random() * 0.01
        if tick % 5 == 0:
            rig.check()
    rig.run()
    rig.check_all()
    assert any(stream.end for stream in rig.streams.values())


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of calls on a small pool; what breaks here is shrunk to a few calls."""

    @initialize(
        blocks=st.integers(2, 12),
        block_size=st.integers(1, 4),
        max_rows=st.integers(1, 4),
        max_step_tokens=st.integers(1, 12),
        prefix_cache=st.booleans(),
    )
    def start(self, blocks: int, block_size: int, max_rows: int, max_step_tokens: int, prefix_cache: bool) -> None:
        capacity = Capacity(
            blocks=blocks,
            block_size=block_size,
            max_rows=max_rows,
            max_step_tokens=max_step_tokens,
            max_model_len=24,
        )
        self.rig = Rig(SchedulerConfig(prefix_cache=prefix_cache), {"m": capacity})

    @rule(length=st.integers(1, 14), n=st.integers(1, 3), max_tokens=st.integers(0, 12), scored=st.booleans())
    def offer(self, length: int, n: int, max_tokens: int, scored: bool) -> None:
        best = 1 if scored else None
        items = self.rig.group(range(length), n, max_tokens, prompt_logprobs=best, stop_token_ids=(1, 2, 3))
        if self.rig.scheduler.offer(items, self.rig.now) is None:
            self.rig.accepted(items)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.rig.cancel(data.draw(st.sampled_from([*self.rig.streams, 7])))

    @rule()
    def launch(self) -> None:
        self.rig.launch()

    @rule()
    def settle(self) -> None:
        if self.rig.in_flight:
            self.rig.settle()

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "rig"):
            self.rig.check()

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.run()
            self.rig.check_all()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
