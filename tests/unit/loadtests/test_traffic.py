"""Users over time, and what they ask for."""

from __future__ import annotations

import random
import statistics

import pytest

from benchmarks.simulation.traces import Recorded
from loadtests.shapes import SHAPES, Shape, users_at
from loadtests.traffic import Asked, Model, Walk

TRACE = [Recorded(0.0, 100, 10), Recorded(1.0, 2000, 20), Recorded(4.0, 10, 3000)]


def walk(pace: float = 1.0, scale: float = 1.0, longest: int = 10_000) -> Walk:
    return Walk(TRACE, pace, scale, longest, random.Random(1))


def test_a_walk_repeats_the_trace_at_its_pace() -> None:
    way = walk(pace=0.5)
    asked = [way.next() for _ in range(30)]
    assert statistics.fmean(each.gap for each in asked) == pytest.approx(1 / 0.5)
    by_prompt = {each.prompt: (each.gap, each.output) for each in asked}
    # The mean gap is 2 s, so that all are as long as they were recorded; the first has one of its own.
    assert by_prompt == {100: (2.0, 10), 2000: (1.0, 20), 10: (3.0, 3000)}


def test_walks_begin_at_different_places() -> None:
    assert len({Walk(TRACE, 1, 1, 10_000, random.Random(seed)).next().prompt for seed in range(20)}) == 3


def test_without_a_pace_there_are_no_gaps() -> None:
    way = walk(pace=0)
    assert {way.next().gap for _ in range(3)} == {0.0}


def test_lengths_are_scaled_and_fit_the_model() -> None:
    way = walk(scale=0.1)
    assert {(asked.prompt, asked.output) for asked in (way.next() for _ in range(3))} == {(10, 1), (200, 2), (1, 300)}
    way = walk(longest=1000)
    for _ in range(3):
        asked = way.next()
        assert 1 <= asked.output <= 400
        assert 1 <= asked.prompt <= 800 - asked.output


MODEL = Model("m", 1000, tokens_per_word=2.0)


def test_bodies_have_the_lengths_that_were_asked_for() -> None:
    asked = Asked(0.0, prompt=60, output=7)
    body = MODEL.completion(asked, random.Random(0), streamed=False)
    assert len(str(body["prompt"]).split()) == 30
    assert (body["max_tokens"], body["ignore_eos"], "stream" in body) == (7, True, False)
    assert MODEL.completion(asked, random.Random(0), streamed=True)["stream_options"] == {"include_usage": True}


def test_chats_share_a_few_beginnings() -> None:
    asked, randomness = Asked(0.0, prompt=300, output=7), random.Random(0)
    bodies = [MODEL.chat(asked, randomness) for _ in range(50)]
    texts = [[message["content"].split() for message in body["messages"]] for body in bodies]  # type: ignore[attr-defined]
    assert {(len(system), len(user)) for system, user in texts} == {(40, 110)}
    assert len({tuple(system) for system, _ in texts}) == 4
    assert len({tuple(user) for _, user in texts}) == 50


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_between_one_user_and_all(shape: Shape) -> None:
    users = [users_at(shape, second, 100, 12) for second in range(100)]
    assert max(users) == 12
    assert min(users) >= 1


def test_shapes_are_what_their_names_say() -> None:
    def users(shape: Shape) -> list[int]:
        return [users_at(shape, second, 100, 12) for second in range(100)]

    assert set(users("steady")) == {12}
    assert users("ramp") == sorted(users("ramp"))
    assert users("ramp")[0] == 1
    spike = users("spike")
    assert [second for second in range(100) if spike[second] == 12] == list(range(40, 60))
    assert set(spike) == {4, 12}
    burst = users("burst")
    assert sum(burst[second] < burst[second + 1] for second in range(99)) == 5
    assert burst.count(12) == 50


def test_after_its_time_a_ramp_stays_and_a_burst_comes_again() -> None:
    assert users_at("ramp", 1000, 100, 12) == 12
    assert [users_at("burst", 100 + second, 100, 12) for second in (5, 15)] == [4, 12]
