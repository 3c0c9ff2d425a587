from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from compression.measures.engine_process import FEWEST_INTERVALS, OUTPUT, ROWS, Request, run
from compression.measures.engine_runs import EngineRuns
from engines.generation.engine import GenerationEngine
from engines.protocol import EngineLoadError, EngineSpec
from tests.unit.generation.tiny_models import LLAMA, load_tiny, model_folder, tiny_spec

PROMPTS = [[(7 * row + place) % 300 for place in range(length)] for row, length in enumerate((1, 5, 90, 17, 40, 2, 70))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), LLAMA)


@pytest.fixture
def engine(folder: Path) -> Iterator[GenerationEngine]:
    loaded = load_tiny(folder, max_batch=3, max_model_len=128)
    yield loaded
    loaded.close()


def ticks() -> Iterator[float]:
    return itertools.count(0.0, 0.001)


def test_answers_are_the_same_alone_and_in_a_crowd(engine: GenerationEngine) -> None:
    runs = EngineRuns(engine, ticks().__next__)
    assert runs.slots == 3
    alone = [runs.run([prompt], 20)[1][0] for prompt in PROMPTS]
    seen: list[int] = []
    trace, together = runs.run(PROMPTS, 20, ended=seen.append)
    assert together == alone
    assert all(len(answer) == 20 for answer in together)
    assert trace.output_tokens == 20 * len(PROMPTS)
    assert seen == list(range(1, len(PROMPTS) + 1))
    assert len(trace.first_tokens) == len(PROMPTS)


def test_an_end_token_ends_an_answer_and_is_no_part_of_it(engine: GenerationEngine) -> None:
    runs = EngineRuns(engine, ticks().__next__)
    whole = runs.run(PROMPTS, 20)[1]
    end = whole[2][7]
    cut = runs.run(PROMPTS, 20, ends=[end])[1]
    for long, short in zip(whole, cut, strict=True):
        assert short == (long[: long.index(end)] if end in long else long)


def test_intervals_are_those_between_pure_decodes(engine: GenerationEngine) -> None:
    trace, _ = EngineRuns(engine, ticks().__next__).run([[1, 2, 3]] * 3, 30)
    assert 25 <= len(trace.intervals) <= 28
    assert all(interval > 0 for interval in trace.intervals)
    assert trace.seconds > sum(trace.intervals)


def test_a_request_gives_answers_and_three_speeds(folder: Path) -> None:
    spec = tiny_spec(folder, max_batch=ROWS["cpu"][-1], max_step_tokens=256)
    said: list[str] = []
    result = run(
        Request(spec=spec, prompts=PROMPTS[:2], most=4),
        lambda what, done, total: said.append(what),
        ticks().__next__,
    )
    assert [len(answer) for answer in result.answers] == [4, 4]
    assert [speed.rows for speed in result.speeds] == list(ROWS["cpu"])
    for speed in result.speeds:
        assert speed.tokens_per_second > 0
        assert speed.token_p50 is not None
        assert speed.token_p99 is not None
        assert 0 < speed.token_p50 <= speed.token_p99
    assert result.peak_bytes > result.weight_bytes > 0
    assert "answering" in said
    assert FEWEST_INTERVALS > OUTPUT


@pytest.mark.parametrize(("context", "lengths"), [(40, (20, 20)), (3, (1, 1))])
def test_speeds_fit_into_a_short_context(folder: Path, context: int, lengths: tuple[int, int]) -> None:
    spec = tiny_spec(folder, max_batch=ROWS["cpu"][-1], max_step_tokens=256, max_model_len=context)
    for speed in run(Request(spec=spec), lambda what, done, total: None, ticks().__next__).speeds:
        assert (speed.prompt, speed.output) == lengths
        assert speed.first_token > 0
        assert (speed.token_p99 is None) == (lengths[1] == 1)


def test_a_model_that_cannot_be_loaded_says_why() -> None:
    with pytest.raises(EngineLoadError, match="there is no such file"):
        run(Request(spec=EngineSpec(name="x", source="nowhere")), lambda *_: None, ticks().__next__)
