from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from engines.generation import truncation
from engines.protocol import SamplingParams
from tests.unit.generation.sampling import Case, draw_together, expected_token

VOCAB = 1500


def random_sampling(rng: random.Random) -> SamplingParams:
    """Any mix of features, each off about half the time."""

    def maybe(value: float, off: float) -> float:
        return value if rng.random() < 0.5 else off

    return SamplingParams(
        seed=rng.randrange(1 << 64),
        choice=rng.randrange(4),
        temperature=rng.choice((0.0, 0.3, 1.0, 1.7)),
        top_p=maybe(rng.uniform(0.05, 0.999), 1.0),
        top_k=int(maybe(rng.choice((1, 2, 20, 100, 1400, 5000)), 0)),
        min_p=maybe(rng.uniform(0.001, 0.3), 0.0),
        repetition_penalty=maybe(rng.uniform(0.8, 1.5), 1.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        logit_bias=tuple((token, rng.uniform(-5, 5)) for token in rng.sample(range(VOCAB), int(maybe(3, 0)))),
        min_tokens=int(maybe(4, 0)),
        stop_token_ids=(7, 11),
    )


def random_case(rng: random.Random) -> Case:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    logits = torch.randn(VOCAB, generator=generator) * rng.choice((0.01, 1.0, 4.0))
    logits[7] += rng.choice((0.0, 8.0))
    length = rng.randrange(1, 40)
    tokens = tuple(rng.randrange(30) for _ in range(length))
    return Case(logits, random_sampling(rng), tokens, rng.randrange(1, length + 1))


def test_a_row_draws_what_the_plain_rules_say() -> None:
    rng = random.Random(1)
    cases = [random_case(rng) for _ in range(150)]
    assert [draw_together([case])[0] for case in cases] == [expected_token(case) for case in cases]


def test_a_rows_token_is_the_same_alone_and_among_any_neighbours() -> None:
    rng = random.Random(2)
    cases = [random_case(rng) for _ in range(60)]
    alone = [draw_together([case])[0] for case in cases]
    for _ in range(20):
        chosen = rng.sample(range(len(cases)), rng.randrange(2, 20))
        assert draw_together([cases[index] for index in chosen]) == [alone[index] for index in chosen]


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (SamplingParams(seed=0), range(8)),
        (SamplingParams(seed=0, temperature=2.0), range(8)),
        (SamplingParams(seed=0, top_k=3), range(3)),
        (SamplingParams(seed=0, top_p=0.8), range(3)),
        (SamplingParams(seed=0, min_p=0.3), range(3)),
        (SamplingParams(seed=0, top_k=4, top_p=0.9), range(4)),
    ],
)
def test_draws_follow_the_softmax_of_what_is_left(sampling: SamplingParams, allowed: range) -> None:
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, -0.5, -1.0, -1.5, -4.0])
    draws = 4000
    # The rows differ in choice and position, as the draws of one reply and of its siblings do.
    cases = [
        Case(
            logits,
            SamplingParams(
                seed=99,
                choice=index % 4,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
            ),
            tokens=(0,) * (1 + index // 4),
        )
        for index in range(draws)
    ]
    counts = Counter(draw_together(cases))
    weights = [math.exp(logits[token].item() / sampling.temperature) for token in allowed]
    assert set(counts) <= set(allowed)
    statistic = sum(
        (counts[token] - draws * weight / sum(weights)) ** 2 / (draws * weight / sum(weights))
        for token, weight in zip(allowed, weights, strict=True)
    )
    # The 99.99th percentile of chi-square with 7 degrees of freedom.
    assert statistic < 29.9


def test_a_nucleus_wider_than_the_first_looks_is_found_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    scaled = torch.randn((6, VOCAB), generator=generator) * torch.tensor([[0.01], [0.1], [1.0], [2.0], [5.0], [20.0]])
    top_p = torch.tensor([0.99, 0.9, 0.5, 0.99, 0.9, 0.99])
    staged = truncation.top_p_threshold(scaled, top_p)
    monkeypatch.setattr(truncation, "NUCLEUS_WIDTHS", ())
    assert torch.equal(staged, truncation.top_p_threshold(scaled, top_p))


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    cases = [Case(logits, SamplingParams(seed=seed, top_k=2, temperature=5.0)) for seed in range(300)]
    assert set(draw_together(cases)) == {1, 2, 3, 4}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(seed=1, temperature=0),
        SamplingParams(seed=1),
        SamplingParams(seed=1, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.3, frequency_penalty=0.4),
    ],
)
def test_broken_logits_give_a_valid_id_and_leave_the_neighbours_alone(value: float, sampling: SamplingParams) -> None:
    good = random_case(random.Random(3))
    partly = torch.zeros(VOCAB)
    partly[100] = value
    cases = [Case(torch.full((VOCAB,), value), sampling), good, Case(partly, sampling)]
    drawn = draw_together(cases)
    assert all(0 <= token < VOCAB for token in drawn)
    assert drawn[1] == draw_together([good])[0]


def test_extreme_parameters_stay_finite() -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 10
    best = int(logits.argmax())
    for sampling in (
        SamplingParams(seed=1, temperature=1e-30),
        SamplingParams(seed=1, temperature=1e-5),
        SamplingParams(seed=1, top_p=1e-9),
        SamplingParams(seed=1, top_k=1),
        SamplingParams(seed=1, min_p=1.0),
    ):
        assert draw_together([Case(logits, sampling)]) == [best]
    assert 0 <= draw_together([Case(logits, SamplingParams(seed=1, temperature=1e30, top_p=0.5))])[0] < VOCAB


def test_ids_beyond_the_vocabulary_are_ignored() -> None:
    sampling = SamplingParams(
        seed=0, temperature=0, logit_bias=((VOCAB + 5, 9.0), (3, 9.0)), min_tokens=5, stop_token_ids=(VOCAB, 4)
    )
    logits = torch.zeros(VOCAB)
    logits[4] = 100
    assert draw_together([Case(logits, sampling)]) == [3]


def test_penalties_over_long_contexts_work_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(4)
    cases = [
        Case(
            torch.randn(VOCAB, generator=torch.Generator().manual_seed(index)),
            SamplingParams(seed=index, repetition_penalty=1.4, frequency_penalty=0.7, presence_penalty=-0.3),
            tuple(rng.randrange(50) for _ in range(rng.randrange(20, 200))),
            10,
        )
        for index in range(7)
    ]
    whole = draw_together(cases)
    monkeypatch.setattr("engines.generation.logit_edits.PENALTY_ELEMENTS", 300)
    assert draw_together(cases) == whole == [expected_token(case) for case in cases]
