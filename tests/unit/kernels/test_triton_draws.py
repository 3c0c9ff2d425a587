"""Draws of whole batches against the sampler's definition, under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from engines.kernels import reference, row_parameters

interpreter = pytest.importorskip("tests.triton_interpreter", reason="needs Triton")
sampling = pytest.importorskip("engines.kernels.cuda.sampling")
truncation = pytest.importorskip("engines.kernels.cuda.truncation")
DEVICE = interpreter.DEVICE
SLOTS = 16


@dataclass
class Row:
    slot: int
    place: int
    seed: int
    choice: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    prompt_length: int = 4

    def line(self) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
        line = np.zeros(row_parameters.FIELDS, np.int32)
        line[:2] = np.array([self.seed], np.uint64).view(np.int32)
        line[row_parameters.CHOICE], line[row_parameters.PROMPT_LENGTH] = self.choice, self.prompt_length
        line[row_parameters.TOP_K] = self.top_k
        line[5:8] = np.array([self.temperature, self.top_p, self.min_p], np.float32).view(np.int32)
        return line

    def expected(self, logits: torch.Tensor) -> int:
        if self.temperature < row_parameters.GREEDY_BELOW:
            return int((logits == logits.max()).nonzero()[0])
        scaled = logits / torch.tensor(self.temperature)
        if self.min_p:
            scaled[scaled < scaled.max() + math.log(self.min_p)] = -torch.inf
        if self.top_k:
            scaled[scaled < scaled.topk(self.top_k).values[-1]] = -torch.inf
        if self.top_p < 1:
            ranked = scaled.softmax(0).sort(descending=True).values
            kept = int((ranked.double().cumsum(0) < self.top_p).sum())
            scaled[scaled < scaled.sort(descending=True).values[kept]] = -torch.inf
        seed = torch.from_numpy(np.array([self.seed], np.uint64).view(np.int64))
        place = torch.tensor([self.place - self.prompt_length])
        noise = reference.gumbel_noise(seed, torch.tensor([self.choice]), place, len(logits))[0]
        scores = scaled + noise
        return int((scores == scores.max()).nonzero()[0])


def draw(rows: list[Row], logits: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    parameters = np.zeros((SLOTS, row_parameters.FIELDS), np.int32)
    for row in rows:
        parameters[row.slot] = row.line()
    tokens = torch.full((SLOTS, 64), -1, dtype=torch.int32, device=DEVICE)
    drawn = torch.full((len(rows),), -7, device=DEVICE)
    sampling.draw_rows(
        logits.to(DEVICE),
        torch.tensor([row.slot for row in rows], dtype=torch.int32, device=DEVICE),
        torch.tensor([row.place for row in rows], dtype=torch.int32, device=DEVICE),
        torch.from_numpy(parameters).to(DEVICE),
        tokens,
        drawn,
        truncation.Truncates(
            top_k=any(row.top_k for row in rows),
            top_p=any(row.top_p < 1 for row in rows),
            min_p=any(row.min_p for row in rows),
        ),
    )
    return drawn.tolist(), tokens.cpu()


def some_rows(rng: random.Random) -> list[Row]:
    settings: list[dict[str, float]] = [
        {"temperature": 0.0},
        {},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 0.7, "min_p": 0.05},
        {"temperature": 0.9, "top_p": 0.5, "top_k": 40},
        {"temperature": 1.3, "top_k": 50},
    ]
    slots = rng.sample(range(SLOTS), len(settings))
    return [
        Row(slot, rng.randrange(5, 60), rng.getrandbits(64), choice=rng.randrange(3), **setting)  # type: ignore[arg-type]
        for slot, setting in zip(slots, settings, strict=True)
    ]


@pytest.mark.parametrize("vocab", [5, 700, 5001])
def test_a_row_draws_what_its_parameters_say(vocab: int) -> None:
    rng = random.Random(vocab)
    rows = [row for row in some_rows(rng) if row.top_k < vocab]
    logits = torch.randn(len(rows), vocab) * 3
    drawn, tokens = draw(rows, logits)
    assert drawn == [row.expected(line) for row, line in zip(rows, logits, strict=True)]
    for row, token in zip(rows, drawn, strict=True):
        assert tokens[row.slot, row.place] == token
    assert int((tokens >= 0).sum()) == len(rows)


def test_padding_draws_nothing_and_a_row_without_numbers_draws_something_valid() -> None:
    rows = [Row(1, 0, 5), Row(2, 9, 5), Row(3, 9, 5, temperature=0.0), Row(4, 9, 6)]
    logits = torch.randn(4, 300)
    logits[1], logits[2] = torch.nan, torch.nan
    logits[3], logits[3, 17] = -torch.inf, 0.0
    drawn, tokens = draw(rows, logits)
    assert drawn[0] == -7
    assert int((tokens[1] >= 0).sum()) == 0
    assert 0 <= drawn[1] < 300
    assert 0 <= drawn[2] < 300
    assert drawn[3] == 17


def test_the_lowest_of_equal_tokens_wins_without_noise() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, [4100, 2200, 4900]] = 3.0
    assert draw([Row(0, 9, 1, temperature=0.0)], logits)[0] == [2200]


def random_rows(rng: random.Random, count: int, **settings: float) -> list[Row]:
    """Of temperatures from 0.01 to 2."""
    return [
        Row(slot, rng.randrange(5, 60), rng.getrandbits(64), temperature=10 ** rng.uniform(-2, 0.3), **settings)  # type: ignore[arg-type]
        for slot in rng.sample(range(SLOTS), count)
    ]


def close_contest(rows: int, vocab: int) -> torch.Tensor:
    """A few tokens, of which any may win, among many that hardly can."""
    logits = torch.full((rows, vocab), -40.0)
    for line in logits:
        line[torch.randperm(vocab)[:6]] = torch.rand(6)
    return logits


LOGITS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "flat": torch.randn,
    "peaked": lambda *shape: torch.randn(shape) * 30,
    "close": close_contest,
    "equal": lambda *shape: torch.randn(shape).round(),
    "masked": lambda *shape: torch.where(torch.rand(shape) < 0.99, -torch.inf, torch.randn(shape)),
    "huge": lambda *shape: torch.randn(shape) * 1e4,
    "far apart": lambda *shape: torch.randn(shape) * 10 ** (torch.rand(shape) * 30 - 10),
}


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize(("count", "vocab"), [(12, 6), (8, 301), (2, 4099)])
def test_the_best_score_wins_whatever_the_logits(kind: str, count: int, vocab: int) -> None:
    rng = random.Random(kind)
    # Rows stand apart, as in a buffer of which they are a part.
    logits = torch.full((count, vocab + 3), torch.nan)[:, :vocab]
    logits.copy_(LOGITS[kind](count, vocab))
    rows = random_rows(rng, count)
    assert draw(rows, logits)[0] == [row.expected(line) for row, line in zip(rows, logits, strict=True)]


def test_the_first_in_rank_loses_to_a_better_score_in_another_part() -> None:
    """A rank exceeds its score by more the less the token's noise is; logits are such that this decides."""
    rng, rows, logits = random.Random(4), [], torch.full((6, 2100), -torch.inf)
    first, second = 5, 2077
    for slot, line in enumerate(logits):
        row = Row(slot, 9, rng.getrandbits(64))
        seed = torch.from_numpy(np.array([row.seed], np.uint64).view(np.int64))
        noise = reference.gumbel_noise(seed, torch.tensor([0]), torch.tensor([5]), 2100)[0]
        noise = noise[[first, second]].double()
        bound = -torch.log(-torch.expm1(-torch.exp(-noise)))
        line[[first, second]] = torch.tensor([0.0, float((noise[0] - noise[1] + bound[0] - bound[1]) / 2)])
        rows.append(row)
    assert draw(rows, logits)[0] == [row.expected(line) for row, line in zip(rows, logits, strict=True)]


def test_low_temperatures_decide_between_close_tokens() -> None:
    """Their scaled logits are so large that a rank's rounding is larger than what they differ by."""
    rng = random.Random(3)
    logits = 200 + torch.rand(SLOTS, 600) * 1e-4
    rows = [Row(slot, 9, rng.getrandbits(64), temperature=2e-5) for slot in range(SLOTS)]
    assert draw(rows, logits)[0] == [row.expected(line) for row, line in zip(rows, logits, strict=True)]


@pytest.mark.parametrize("setting", [{"top_k": 3}, {"top_k": 1}, {"min_p": 0.999}])
def test_what_is_just_below_the_floor_never_wins(setting: dict[str, float]) -> None:
    """The noise favours some of the next tokens, which differ from the last admitted one in the last bits."""
    rng = random.Random(5)
    logits = torch.stack([torch.randperm(300) for _ in range(8)]) * 2.0**-16 + 100.0
    rows = random_rows(rng, 8, **setting)
    assert draw(rows, logits)[0] == [row.expected(line) for row, line in zip(rows, logits, strict=True)]


def test_an_infinite_logit_wins() -> None:
    logits = torch.randn(2, 2500)
    logits[:, 2222] = torch.inf
    assert draw([Row(1, 9, 4), Row(2, 9, 4, temperature=0.0)], logits)[0] == [2222, 2222]
