from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.generation.engine import GenerationEngine
from engines.manifest import read_manifest
from engines.models.batch import Batch
from engines.models.loader import load_model
from engines.protocol import Admit, EngineLoadError, Row, SamplingParams, StepPlan, StepResult
from tests.unit.generation.tiny_models import load_tiny, tiny_spec

PROMPT = [5, 17, 200, 31, 31, 8, 150, 44, 2, 99, 7, 7, 7, 250, 3, 60, 61, 62, 63]
GREEDY = SamplingParams(seed=0, temperature=0)


class Driver:
    """Drives one row at a time, one step ahead, with the block ids in any order."""

    def __init__(self, engine: GenerationEngine, blocks: list[int], slot: int = 0) -> None:
        self._engine = engine
        self._blocks = iter(blocks)
        self._slot = slot
        self._held = 0
        self._step = 0

    def row(self, start: int, count: int, max_new: int = 1) -> Row:
        needed = -(-(start + count) // self._engine.capacity.block_size)
        new = tuple(next(self._blocks) for _ in range(needed - self._held))
        self._held = max(needed, self._held)
        return Row(item=1, slot=self._slot, start=start, count=count, new_blocks=new, max_new=max_new)

    def run(self, tokens: list[int], count: int, chunk: int = 64, **admit: Any) -> list[StepResult]:
        """Compute the prompt in chunks and draw ``count`` tokens."""
        values: dict[str, Any] = {"prompt_length": len(tokens), "blocks": (), "sampling": GREEDY} | admit
        admits: tuple[Admit, ...] = (Admit(item=1, slot=self._slot, tokens=tokens, **values),)
        starts = range(len(values["blocks"]) * self._engine.capacity.block_size, len(tokens), chunk)
        rows = [self.row(start, min(chunk, len(tokens) - start), int(start + chunk >= len(tokens))) for start in starts]
        rows += [self.row(len(tokens) + index, 1) for index in range(count - 1)]
        results = []
        for index, row in enumerate(rows):
            self._engine.launch(StepPlan(step=index, engine="tiny", admits=admits if index == 0 else (), rows=(row,)))
            if index:
                results.append(self._engine.collect(index - 1))
        results.append(self._engine.collect(len(rows) - 1))
        return results

    def tokens(self, *args: Any, **kwargs: Any) -> list[int]:
        return [token for result in self.run(*args, **kwargs) for token in result.rows[0].tokens]


def whole_prompt_greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    """The same model without an engine: the whole sequence again for each token, in a cache of its own."""
    model = load_model(read_manifest(folder, True), tiny_spec(folder), torch.device("cpu"), torch.float32, print)
    tokens = list(prompt)
    for _ in range(count):
        length = len(tokens)
        caches = [
            tuple(torch.zeros((1, length, *shape)) for shape in model.kv_layout.token_shapes)
            for _ in range(model.kv_layout.layers)
        ]
        batch = Batch(
            token_ids=torch.tensor(tokens),
            positions=torch.arange(length),
            cache_slots=torch.arange(length),
            query_starts=torch.tensor([0, length], dtype=torch.int32),
            context_lengths=torch.tensor([length], dtype=torch.int32),
            block_tables=torch.zeros((1, 1), dtype=torch.int32),
            decode_rows=0,
            longest_query=length,
            longest_context=length,
        )
        tokens.append(int(model.logits(model.forward(batch, caches)[-1:]).argmax()))
    return tokens[len(prompt) :]


def test_greedy_tokens_are_those_of_the_model_alone(engine: GenerationEngine, folder: Path) -> None:
    assert Driver(engine, [3, 1, 9, 4]).tokens(PROMPT, 30) == whole_prompt_greedy(folder, PROMPT, 30)


@pytest.mark.parametrize("chunk", [1, 5, 16])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(seed=7, top_p=0.9), SamplingParams(seed=7, choice=2)])
def test_chunks_and_slots_and_blocks_change_no_token(
    engine: GenerationEngine, chunk: int, sampling: SamplingParams
) -> None:
    whole = Driver(engine, [0, 1, 2]).tokens(PROMPT, 12, sampling=sampling)
    assert Driver(engine, [100, 7, 55], slot=5).tokens(PROMPT, 12, chunk=chunk, sampling=sampling) == whole


def test_recompute_and_prefix_hit_continue_the_same_tokens(engine: GenerationEngine) -> None:
    sampling = SamplingParams(seed=3, temperature=0.8, frequency_penalty=0.5, repetition_penalty=1.2)
    whole = Driver(engine, [0, 1, 2]).tokens(PROMPT, 20, sampling=sampling)
    back = PROMPT + whole[:8]
    again = Driver(engine, [9, 8, 7], slot=2).tokens(back, 12, prompt_length=len(PROMPT), sampling=sampling)
    assert again == whole[8:]
    hit = Driver(engine, [20, 21], slot=3)
    hit._held = 1
    assert hit.tokens(back, 12, prompt_length=len(PROMPT), sampling=sampling, blocks=(9,)) == whole[8:]


def test_logprobs_are_of_the_raw_distribution(engine: GenerationEngine) -> None:
    plain = SamplingParams(seed=1, temperature=0, logprobs=3)
    bent = SamplingParams(seed=1, temperature=0.2, top_k=1, logprobs=3, logit_bias=((9, 50.0),))
    (first,) = Driver(engine, [0, 1]).run(PROMPT, 1, sampling=plain)[0].rows[0].logprobs
    row = Driver(engine, [0, 1]).run(PROMPT, 1, sampling=bent)[0].rows[0]
    assert row.tokens == [9]
    assert (row.logprobs[0].top_ids, row.logprobs[0].top_logprobs) == (first.top_ids, first.top_logprobs)
    assert row.logprobs[0].logprob < first.logprob == first.top_logprobs[0]
    assert first.top_logprobs == sorted(first.top_logprobs, reverse=True)


def test_prompt_logprobs_are_those_of_the_next_tokens_in_any_chunks(
    engine: GenerationEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.generation.logprobs.PROMPT_CHUNK", 4)
    whole = Driver(engine, [0, 1]).run(PROMPT, 1, prompt_logprobs=2)[0].rows[0].prompt_logprobs
    chunked = Driver(engine, [5, 6]).run(PROMPT, 1, chunk=6, prompt_logprobs=2)
    assert len(whole) == len(PROMPT) - 1
    assert [entry for result in chunked for entry in result.rows[0].prompt_logprobs] == whole
    drawn = Driver(engine, [0, 1]).run(PROMPT[:-1], 1, sampling=SamplingParams(seed=0, logprobs=2))[0].rows[0]
    assert drawn.logprobs[0].top_ids == whole[-1].top_ids


def test_launch_does_not_wait_for_the_step(engine: GenerationEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    assert engine._loaded is not None
    runner = engine._loaded.runner
    run = runner.run
    monkeypatch.setattr(runner, "run", lambda plan: (gate.wait(60), run(plan))[1])
    rows = (Row(item=1, slot=0, start=0, count=3, new_blocks=(0,), max_new=1),)
    admits = (Admit(item=1, slot=0, tokens=[1, 2, 3], prompt_length=3, blocks=(), sampling=GREEDY),)
    times = []
    for step in range(2):
        began = time.perf_counter()
        engine.launch(StepPlan(step=step, engine="tiny", admits=admits, rows=rows))
        times.append(time.perf_counter() - began)
    with pytest.raises(RuntimeError, match="in flight"):
        engine.launch(StepPlan(step=2, engine="tiny", rows=rows))
    with pytest.raises(RuntimeError, match="oldest"):
        engine.collect(1)
    gate.set()
    assert [engine.collect(step).step for step in range(2)] == [0, 1]
    assert min(times) < 0.001


def test_a_failed_step_surfaces_in_collect_and_stops_the_engine(folder: Path) -> None:
    engine = load_tiny(folder)
    beyond = Row(item=1, slot=engine.capacity.max_rows, start=0, count=1, new_blocks=(), max_new=1)
    good = Row(item=1, slot=0, start=0, count=1, new_blocks=(0,), max_new=1)
    engine.launch(StepPlan(step=0, engine="tiny", rows=(beyond,)))
    engine.launch(StepPlan(step=1, engine="tiny", rows=(good,)))
    for step in range(2):
        with pytest.raises(IndexError):
            engine.collect(step)
    engine.close()
    engine.close()


def test_info_and_capacity_tell_what_was_loaded(engine: GenerationEngine) -> None:
    info, capacity = engine.info, engine.capacity
    assert (info.device, info.dtype, info.kv_dtype, info.threads, info.vocab_size) == (
        "cpu",
        "float32",
        "float32",
        1,
        300,
    )
    assert (capacity.max_rows, capacity.max_step_tokens, capacity.max_model_len) == (8, 64, 256)
    assert capacity.blocks == 8 * 256 // capacity.block_size
    assert info.weight_bytes > 0
    assert info.kv_bytes % capacity.blocks == 0


def test_a_small_step_bounds_the_rows(folder: Path) -> None:
    engine = load_tiny(folder, max_step_tokens=4, max_model_len=32)
    assert (engine.capacity.max_rows, engine.capacity.max_step_tokens, engine.capacity.blocks) == (4, 4, 8)
    engine.close()


def test_sizes_nobody_asked_for_come_from_the_machine(folder: Path) -> None:
    before = torch.get_num_threads()
    engine = load_tiny(folder, threads=None, max_batch=None, max_step_tokens=None)
    assert engine.capacity.max_rows == 64
    assert engine.capacity.max_step_tokens in (128, 256, 512)
    assert 1 <= engine.info.threads <= (os.cpu_count() or 1)
    assert len(Driver(engine, [0, 1, 2]).tokens(PROMPT, 20)) == 20
    engine.close()
    torch.set_num_threads(before)


def test_another_kv_dtype_or_seed_is_another_fingerprint(folder: Path) -> None:
    variants: list[dict[str, Any]] = [{}, {"random_weights": 2}, {"kv_dtype": "bfloat16"}, {"dtype": "bfloat16"}]
    engines = [load_tiny(folder, **variant) for variant in variants]
    assert len({engine.info.fingerprint for engine in engines}) == len(variants)
    assert engines[3].info.kv_dtype == "bfloat16"
    for engine in engines:
        assert len(Driver(engine, [0, 1, 2]).tokens(PROMPT, 4)) == 4
        engine.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float16"}, "float16 .* CPU"),
        ({"dtype": "int3"}, "unknown --dtype 'int3'"),
        ({"kv_dtype": "float16"}, "--kv-dtype"),
        ({"device": "cuda:99"}, "CUDA device|there is no cuda:99"),
        ({"device": "toaster"}, "unknown device 'toaster'"),
        ({"max_model_len": 300}, "300 .* 256"),
        ({"memory_limit": 1}, "memory"),
        ({"memory_limit": 32 << 10, "max_model_len": 256}, "memory"),
        ({"source": "/nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_served_is_refused_in_words(folder: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineLoadError, match=message):
        load_tiny(folder, **fields)


def test_a_load_measures_steps_and_the_next_one_takes_them_over(folder: Path, engine: GenerationEngine) -> None:
    measured = engine.info.measured
    assert measured is not None
    tokens = [sample.tokens for sample in measured.profile]
    assert (min(tokens), max(tokens)) == (1, 64)
    assert max(sample.rows for sample in measured.profile) == 8
    assert all(sample.seconds > 0 for sample in measured.profile)
    again = load_tiny(folder, measured=measured)
    assert again.info.measured == measured
    again.close()


def test_auto_resolves_to_a_device_that_is_there(folder: Path) -> None:
    engine = load_tiny(folder, device="auto")
    assert engine.info.device == ("cuda:0" if torch.cuda.is_available() else "cpu")
    engine.close()
