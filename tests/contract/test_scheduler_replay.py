"""A worker has died: its streams go on in a new scheduler, offered as prompt and tokens so far."""

from __future__ import annotations

import msgspec
import pytest

from engines.protocol import Engine
from server.scheduler.config import SchedulerConfig
from tests.contract.loop import Loop, alone, make_items


@pytest.mark.parametrize("budget", [None, 7])
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_every_stream_continues_where_its_log_ends(engine: Engine, steps: int, budget: int | None) -> None:
    requests = [
        make_items(range(3, 40), n=2, max_tokens=12, seed=3),
        make_items(range(9), max_tokens=12, seed=4, logprobs=1),
    ]
    died = Loop(engine)
    logs = {item.item: heard for items in requests for item, heard in zip(items, died.offer(items), strict=True)}
    for _ in range(steps):
        died.launch()
        if len(died.in_flight) == 2:
            died.settle()
    while died.in_flight:
        engine.collect(died.in_flight.popleft()[1])

    after = Loop(engine, SchedulerConfig(token_budget=budget))
    for items in requests:
        replayed = [msgspec.structs.replace(item, tokens=item.tokens + logs[item.item].tokens) for item in items]
        for item, heard in zip(items, after.offer(replayed), strict=True):
            logs[item.item].logprobs += heard.logprobs
            heard.logprobs = logs[item.item].logprobs
            heard.tokens = logs[item.item].tokens
    after.run()
    for item in (item for items in requests for item in items):
        solo = alone(engine, item)
        assert after.heard[item.item].tokens == solo.tokens
        assert len(after.heard[item.item].logprobs) == len(solo.logprobs)
