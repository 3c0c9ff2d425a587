"""What every engine that produces tokens must do, whatever computes them.

The measure is the stream that an item hears alone. In fp32 no neighbour, chunk, hit, preemption or replay changes it.
"""

from __future__ import annotations

import random

import pytest

from engines.protocol import Engine
from server.scheduler.config import SchedulerConfig
from server.worker.wire import Item
from tests.contract.conftest import MAX_MODEL_LEN, MAX_ROWS, MAX_STEP_TOKENS
from tests.contract.loop import Heard, Loop, alone, make_items


def prompts(engine: Engine, *lengths: int) -> list[list[int]]:
    rng = random.Random(str(lengths))
    return [[rng.randrange(engine.info.vocab_size) for _ in range(length)] for length in lengths]


def requests(engine: Engine, *lengths: int, max_tokens: int = 6) -> list[Item]:
    """One item for each length, all with different seeds."""
    return [
        make_items(prompt, max_tokens=max_tokens, seed=seed)[0] for seed, prompt in enumerate(prompts(engine, *lengths))
    ]


def same_as_alone(engine: Engine, loop: Loop, items: list[Item], depth: int = 2) -> list[Heard]:
    """Run the items together and compare each with its own solo run."""
    heard = [loop.offer([item])[0] for item in items]
    loop.run(depth)
    for item, one in zip(items, heard, strict=True):
        solo = alone(engine, item)
        assert (one.tokens, one.end) == (solo.tokens, solo.end)
    return heard


def test_info_and_capacity(engine: Engine) -> None:
    info, capacity = engine.info, engine.capacity
    assert info.name == "m"
    assert info.fingerprint
    assert info.vocab_size > 1
    assert (capacity.max_model_len, capacity.max_rows) == (MAX_MODEL_LEN, MAX_ROWS)
    assert MAX_ROWS <= capacity.max_step_tokens <= MAX_STEP_TOKENS
    assert capacity.blocks * capacity.block_size >= MAX_MODEL_LEN
    assert list(capacity.graph_rows) == sorted(capacity.graph_rows)


def test_all_tokens_come_and_are_in_the_vocabulary(engine: Engine) -> None:
    (item,) = requests(engine, 7, max_tokens=9)
    heard = alone(engine, item)
    assert (len(heard.tokens), heard.end) == (9, "length")
    assert all(0 <= token < engine.info.vocab_size for token in heard.tokens)
    assert heard.logprobs == heard.prompt_logprobs == []


def test_the_context_can_be_filled_to_its_end(engine: Engine) -> None:
    (item,) = requests(engine, MAX_MODEL_LEN - 3, max_tokens=50)
    heard = alone(engine, item)
    assert (len(heard.tokens), heard.end) == (3, "length")


def test_a_prompt_alone_gives_no_token(engine: Engine) -> None:
    (item,) = requests(engine, 20, max_tokens=0)
    assert alone(engine, item) == Heard(end="length")


@pytest.mark.parametrize("depth", [1, 2])
def test_neighbours_do_not_matter(engine: Engine, depth: int) -> None:
    same_as_alone(engine, Loop(engine), requests(engine, 1, 5, 16, 17, 33, 40), depth)


@pytest.mark.parametrize("budget", [6, 7, 16, 33])
def test_chunks_do_not_matter(engine: Engine, budget: int) -> None:
    config = SchedulerConfig(token_budget=budget, prefix_cache=False)
    same_as_alone(engine, Loop(engine, config), requests(engine, 3, 40, 61))


def test_items_come_and_go(engine: Engine) -> None:
    items = requests(engine, *range(1, 25), max_tokens=5)
    same_as_alone(engine, Loop(engine, max_rows=3), items)


def test_found_blocks_are_as_good_as_computed_ones(engine: Engine) -> None:
    size = engine.capacity.block_size
    (prefix,) = prompts(engine, 2 * size)
    loop = Loop(engine)
    loop.offer(make_items([*prefix, 1, 2], max_tokens=1))
    loop.run()
    items = [make_items([*prefix, token], seed=token)[0] for token in (1, 3, 3)]
    heard = same_as_alone(engine, loop, items)
    assert [one.cached_tokens for one in heard] == [2 * size] * 3


def test_choices_of_one_prompt_share_it_and_differ(engine: Engine) -> None:
    (prompt,) = prompts(engine, 2 * engine.capacity.block_size + 3)
    items = make_items(prompt, n=4, max_tokens=8)
    loop = Loop(engine)
    heard = loop.offer(items)
    loop.run()
    assert [one.tokens for one in heard] == [alone(engine, item).tokens for item in items]
    assert len({tuple(one.tokens) for one in heard}) > 1


def test_the_seed_decides(engine: Engine) -> None:
    (prompt,) = prompts(engine, 9)
    first, again, other = (alone(engine, make_items(prompt, max_tokens=8, seed=seed)[0]) for seed in (5, 5, 2**64 - 1))
    assert first.tokens == again.tokens
    assert first.tokens != other.tokens


def test_preempted_items_continue_their_streams(engine: Engine) -> None:
    size = engine.capacity.block_size
    items = requests(engine, size - 1, size - 1, size - 1, max_tokens=2 * size)
    loop = Loop(engine, SchedulerConfig(prefix_cache=False), blocks=5)
    same_as_alone(engine, loop, items)
    assert loop.scheduler.load()[0].preemptions > 0


def test_a_slot_changes_hands_while_its_last_row_is_in_flight(engine: Engine) -> None:
    first, second = requests(engine, 20, 12)
    loop = Loop(engine, max_rows=1)
    (left,) = loop.offer([first])
    (heard,) = loop.offer([second])
    for _ in range(2):
        loop.launch()
    loop.settle()
    loop.scheduler.cancel([first.item])
    assert loop.launch()
    assert loop.plans[-1].admits[0].slot == loop.plans[-2].rows[0].slot
    loop.run()
    assert left.tokens == alone(engine, first).tokens[:1]
    assert heard.tokens == alone(engine, second).tokens


@pytest.mark.parametrize("best", [0, 3])
def test_logprobs_are_those_of_the_tokens(engine: Engine, best: int) -> None:
    (prompt,) = prompts(engine, 10)
    heard = alone(engine, make_items(prompt, logprobs=best, prompt_logprobs=best)[0])
    assert len(heard.logprobs) == len(heard.tokens)
    # The first token of a prompt has nothing before it, so no probability.
    assert len(heard.prompt_logprobs) == len(prompt) - 1
    for token, entry in zip([*prompt[1:], *heard.tokens], [*heard.prompt_logprobs, *heard.logprobs], strict=True):
        assert entry.logprob <= 0
        assert len(entry.top_ids) == len(entry.top_logprobs) == best
        assert entry.top_logprobs == sorted(entry.top_logprobs, reverse=True)
        if token in entry.top_ids:
            assert entry.top_logprobs[entry.top_ids.index(token)] == pytest.approx(entry.logprob, abs=1e-5)


def test_logprobs_are_for_those_who_asked(engine: Engine) -> None:
    plain, scored = requests(engine, 8, 30)
    (asked,) = make_items(scored.tokens, seed=scored.sampling.seed, logprobs=2, prompt_logprobs=1)
    loop = Loop(engine, SchedulerConfig(token_budget=9))
    heard = same_as_alone(engine, loop, [plain, asked])
    assert heard[0].logprobs == heard[0].prompt_logprobs == []
    solo = alone(engine, asked)
    for mine, its in ((heard[1].logprobs, solo.logprobs), (heard[1].prompt_logprobs, solo.prompt_logprobs)):
        assert [entry.logprob for entry in mine] == pytest.approx([entry.logprob for entry in its], abs=1e-4)


def test_random_traffic(engine: Engine) -> None:
    rng = random.Random(7)
    size = engine.capacity.block_size
    loop = Loop(engine, SchedulerConfig(token_budget=20), blocks=2 + MAX_MODEL_LEN // size)
    (prefix,) = prompts(engine, 2 * size)
    offered: list[tuple[Item, Heard]] = []
    for _ in range(60):
        if rng.random() < 0.3:
            prompt = [*prefix[: rng.randint(1, 2 * size)], rng.randrange(engine.info.vocab_size)]
            items = make_items(
                prompt, n=rng.choice([1, 1, 2]), max_tokens=rng.randint(1, 2 * size), seed=rng.randrange(2**64)
            )
            offered += zip(items, loop.offer(items), strict=True)
        if rng.random() < 0.1 and offered:
            loop.scheduler.cancel([rng.choice(offered)[0].item])
        loop.launch()
        if loop.in_flight and rng.random() < 0.6:
            loop.settle()
    loop.run()
    for item, heard in offered:
        solo = alone(engine, item)
        assert heard.tokens == solo.tokens[: len(heard.tokens)]
        assert heard.end in ("", solo.end)
    assert sum(heard.end == "length" for _, heard in offered) > 5
