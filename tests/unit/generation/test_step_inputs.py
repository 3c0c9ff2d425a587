from __future__ import annotations

import torch

from engines.generation.rows import RowStates
from engines.generation.step_inputs import build_inputs
from engines.protocol import Admit, Capacity, Row, SamplingParams

CAPACITY = Capacity(blocks=20, block_size=4, max_rows=4, max_step_tokens=32, max_model_len=24)
GREEDY = SamplingParams(seed=0, temperature=0)


def admitted(*admits: Admit) -> RowStates:
    states = RowStates(CAPACITY, 50, torch.device("cpu"))
    for admit in admits:
        states.admit(admit)
    return states


def admit(slot: int, tokens: list[int], sampling: SamplingParams = GREEDY, **fields: object) -> Admit:
    values: dict[str, object] = {"prompt_length": len(tokens), "blocks": ()} | fields
    return Admit(item=slot + 100, slot=slot, tokens=tokens, sampling=sampling, **values)  # type: ignore[arg-type]


def row(slot: int, start: int, count: int, new_blocks: tuple[int, ...] = (), max_new: int = 1) -> Row:
    return Row(item=slot + 100, slot=slot, start=start, count=count, new_blocks=new_blocks, max_new=max_new)


def test_rows_are_flattened_with_their_places_in_the_cache() -> None:
    states = admitted(admit(2, [5, 6, 7, 8, 9], blocks=(3,)), admit(0, list(range(10, 20))))
    rows = [row(2, 4, 1, (7,)), row(0, 0, 6, (1, 4), max_new=0)]
    states.extend(rows)
    batch = build_inputs(rows, states).batch
    assert batch.token_ids.tolist() == [9, 10, 11, 12, 13, 14, 15]
    assert batch.positions.tolist() == [4, 0, 1, 2, 3, 4, 5]
    assert batch.cache_slots.tolist() == [28, 4, 5, 6, 7, 16, 17]
    assert batch.query_starts.tolist() == [0, 1, 7]
    assert batch.context_lengths.tolist() == [5, 6]
    assert batch.block_tables.tolist() == [[3, 7], [1, 4]]
    assert (batch.decode_rows, batch.longest_query, batch.longest_context) == (1, 6, 6)
    assert [tensor.dtype for tensor in (batch.token_ids, batch.positions, batch.cache_slots)] == [torch.int64] * 3
    assert [tensor.dtype for tensor in (batch.query_starts, batch.context_lengths, batch.block_tables)] == [
        torch.int32
    ] * 3


def test_a_row_in_mid_prompt_draws_nothing() -> None:
    states = admitted(admit(0, [1] * 8), admit(1, [2] * 3))
    rows = [row(0, 0, 4, (0,), max_new=0), row(1, 0, 3, (1,))]
    states.extend(rows)
    drawing = build_inputs(rows, states).drawing
    assert drawing is not None
    assert drawing.rows.tolist() == [1]
    assert drawing.last_tokens.tolist() == [6]
    assert drawing.places.tolist() == [3]
    assert build_inputs(rows[:1], states).drawing is None


def test_an_admit_leaves_nothing_of_the_slots_former_row() -> None:
    rich = SamplingParams(
        seed=(1 << 64) - 1,
        choice=3,
        temperature=0.5,
        top_p=0.5,
        top_k=4,
        min_p=0.2,
        repetition_penalty=1.5,
        presence_penalty=1,
        frequency_penalty=1,
        logit_bias=((3, 4.0),),
        logprobs=5,
        min_tokens=9,
        stop_token_ids=(1,),
    )
    former = admit(1, [9] * 12, rich, blocks=(5, 6, 7), prompt_logprobs=4, prompt_length=3)
    plain = admit(1, [4, 4], blocks=())
    used, fresh = admitted(former, plain), admitted(plain)
    for name in ("kinds", "seeds", "choices", "top_k", "prompt_lengths", "min_tokens", "temperature", "top_p", "min_p"):
        assert getattr(used, name).tolist() == getattr(fresh, name).tolist(), name
    for name in ("repetition", "frequency", "presence", "penalized", "logprobs", "prompt_logprobs", "tables"):
        assert getattr(used, name).tolist() == getattr(fresh, name).tolist(), name
    assert (used.biases, used.stop_ids, used.table_lengths) == ({}, {}, [0, 0, 0, 0])


def test_a_row_that_comes_back_goes_on_at_its_output_position() -> None:
    states = admitted(admit(3, [1, 2, 3, 4, 5, 6], prompt_length=4))
    rows = [row(3, 0, 6, (2, 9))]
    states.extend(rows)
    drawing = build_inputs(rows, states).drawing
    assert drawing is not None
    assert drawing.draws.noise.positions.tolist() == [2]


def test_prompt_scoring_covers_the_prompts_own_tokens_only() -> None:
    states = admitted(admit(0, [1, 2, 3, 4, 5, 6], prompt_length=6, prompt_logprobs=2))
    first = build_inputs([row(0, 0, 4, (0,), max_new=0)], states).prompts
    last = build_inputs([row(0, 4, 2, (1,))], states).prompts
    after = build_inputs([row(0, 6, 1)], states).prompts
    assert [(scoring.place, scoring.count, scoring.width) for scoring in first] == [(1, 4, 2)]
    assert [(scoring.place, scoring.count) for scoring in last] == [(5, 1)]
    assert after == []
