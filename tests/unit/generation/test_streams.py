from __future__ import annotations

import random
from typing import Any

import pytest

from engines.generation.engine import GenerationEngine
from server.worker.wire import Item
from tests.unit.generation.streams import Streams, item, mixed_items

COUNT = 24


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return mixed_items(COUNT, 300, random.Random(11))


def run_alone(engine: GenerationEngine, items: list[Item]) -> dict[int, list[int]]:
    """What each request gets when nothing else runs and nothing is cached."""
    tokens: dict[int, list[int]] = {}
    for request in items:
        streams = Streams(engine, prefix_cache=False)
        streams.offer([request])
        streams.run()
        tokens |= streams.tokens
    return tokens


@pytest.fixture(scope="module")
def alone(engine: GenerationEngine, items: list[Item]) -> dict[int, list[int]]:
    return run_alone(engine, items)


def run_together(engine: GenerationEngine, items: list[Item], rng: random.Random, **config: Any) -> Streams:
    """Offer the requests a few at a time while others run."""
    streams = Streams(engine, **config)
    waiting = list(items)
    while waiting:
        for _ in range(rng.randrange(1, 4)):
            if waiting:
                streams.offer([waiting.pop()])
        for _ in range(rng.randrange(4)):
            streams.step()
    streams.run()
    assert set(streams.ends) == {request.item for request in items}
    return streams


@pytest.mark.parametrize("seed", range(3))
def test_a_request_gets_the_same_tokens_in_any_company(
    engine: GenerationEngine, items: list[Item], alone: dict[int, list[int]], seed: int
) -> None:
    streams = run_together(engine, items, random.Random(seed))
    assert streams.tokens == alone
    assert streams.cached


def test_a_request_gets_the_same_tokens_in_chunks_of_its_prompt(
    engine: GenerationEngine, items: list[Item], alone: dict[int, list[int]]
) -> None:
    assert run_together(engine, items, random.Random(1), token_budget=9, max_batch=5).tokens == alone


def test_a_request_gets_the_same_tokens_after_preemption(engine: GenerationEngine) -> None:
    rng = random.Random(5)
    settings: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 0},
        {"top_p": 0.8, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    )
    items = [item(number, [rng.randrange(300) for _ in range(20)], 90, **settings[number % 3]) for number in range(6)]
    streams = run_together(engine, items, rng, blocks=16)
    assert streams.tokens == run_alone(engine, items)
    assert streams.scheduler.load()[0].preemptions > 0


def test_siblings_draw_different_tokens_from_one_prompt(engine: GenerationEngine) -> None:
    prompt = list(range(40, 90))
    siblings = [
        Item(
            item=choice,
            request=1,
            engine="tiny",
            tokens=prompt,
            prompt_length=len(prompt),
            max_tokens=8,
            sampling=item(7, prompt, 8, choice=choice).sampling,
        )
        for choice in range(4)
    ]
    streams = Streams(engine)
    streams.offer(siblings)
    streams.run()
    assert len({tuple(tokens) for tokens in streams.tokens.values()}) == 4
    assert streams.cached == {choice: 48 for choice in range(1, 4)}
