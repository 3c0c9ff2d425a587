"""The fake engine's tokens are what its function says, and every way to break the contract is refused."""

from __future__ import annotations

import msgspec
import pytest

from engines.fake import FAKE_VOCAB, BrokenPlanError, FakeEngine, fake_output, fake_token
from engines.protocol import Admit, Capacity, EngineSpec, LoadProgress, OneShotRow, Row, SamplingParams, StepPlan
from engines.registry import create

CAPACITY = Capacity(
    blocks=8, block_size=4, max_rows=3, max_step_tokens=16, max_model_len=20, graph_rows=(2,), graph_tokens=(4,)
)


def admit(item: int = 1, slot: int = 0, tokens: int = 6, blocks: tuple[int, ...] = (), first: int = 0) -> Admit:
    return Admit(
        item=item,
        slot=slot,
        tokens=list(range(first, first + tokens)),
        prompt_length=tokens,
        blocks=blocks,
        sampling=SamplingParams(seed=item),
    )


def row(
    start: int, count: int, new_blocks: tuple[int, ...] = (), max_new: int = 1, item: int = 1, slot: int = 0
) -> Row:
    return Row(item=item, slot=slot, start=start, count=count, new_blocks=new_blocks, max_new=max_new)


class Script:
    """Launches and collects one plan after the other."""

    def __init__(self) -> None:
        self.engine = FakeEngine("m", CAPACITY)
        self.step = 0

    def plan(self, *rows: Row, admits: tuple[Admit, ...] = (), **fields: object) -> StepPlan:
        self.step += 1
        plan = StepPlan(step=self.step, engine="m", admits=admits, rows=rows)
        return msgspec.structs.replace(plan, **fields)

    def run(self, *rows: Row, admits: tuple[Admit, ...] = (), **fields: object) -> list[list[int]]:
        plan = self.plan(*rows, admits=admits, **fields)
        self.engine.launch(plan)
        return [result.tokens for result in self.engine.collect(plan.step).rows]

    def refuses(self, words: str, *rows: Row, admits: tuple[Admit, ...] = (), **fields: object) -> None:
        with pytest.raises(BrokenPlanError, match=words):
            self.engine.launch(self.plan(*rows, admits=admits, **fields))


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def running(script: Script) -> Script:
    """Item 1 sits in slot 0 with six prompt tokens computed in blocks 0 and 1, and one token drawn."""
    assert script.run(row(0, 6, (0, 1)), admits=(admit(),)) == [[fake_token(1, 0, 0)]]
    return script


def test_tokens_are_a_function_of_seed_choice_and_position() -> None:
    tokens = [fake_token(seed, choice, position) for seed in range(9) for choice in range(9) for position in range(9)]
    assert all(0 <= token < FAKE_VOCAB for token in tokens)
    assert len(set(tokens)) > 200
    assert fake_token(7, 1, 2) == fake_token(7, 1, 2)
    # Other processes compute the same: nothing of it depends on the interpreter's hash seed.
    assert [fake_token(1, 0, position) for position in range(4)] == [253, 104, 119, 232]
    assert fake_token(2**64 - 1, 0, 0, vocab=2) in (0, 1)


def test_prefill_decode_and_resume(running: Script) -> None:
    assert running.run(row(6, 1)) == [[fake_token(1, 0, 1)]]
    drawn = [fake_token(1, 0, 0), fake_token(1, 0, 1)]
    again = msgspec.structs.replace(admit(slot=2), tokens=[*range(6), *drawn], blocks=(0,))
    resumed = row(4, 4, (5,), slot=2)
    assert running.run(resumed, admits=(again,)) == [[fake_token(1, 0, 2)]]


def test_two_steps_are_in_flight_and_the_second_uses_the_token_of_the_first(script: Script) -> None:
    first, second = script.plan(row(0, 6, (0, 1)), admits=(admit(),)), script.plan(row(6, 1))
    assert [script.engine.launch(first), script.engine.launch(second)] == [1, 2]
    script.refuses("third", row(7, 1))
    with pytest.raises(BrokenPlanError, match="oldest"):
        script.engine.collect(2)
    assert script.engine.collect(1).rows[0].tokens == [fake_token(1, 0, 0)]
    assert script.engine.collect(2).rows[0].tokens == [fake_token(1, 0, 1)]


def test_chunks_draw_nothing_before_the_end(script: Script) -> None:
    assert script.run(row(0, 4, (0,), max_new=0), admits=(admit(),)) == [[]]
    assert script.run(row(4, 2, (1,))) == [[fake_token(1, 0, 0)]]


def test_one_shot_items_give_an_output(script: Script) -> None:
    rows = (OneShotRow(item=5, bucket=1, rows=2), OneShotRow(item=6, bucket=1, rows=1))
    script.engine.launch(script.plan(one_shot=rows, padded_rows=3))
    result = script.engine.collect(1)
    assert [given.output for given in result.rows] == [fake_output(5, 1, 2), fake_output(6, 1, 1)]


class TestRefusals:
    def test_a_position_computed_twice_or_skipped(self, running: Script) -> None:
        running.refuses("skips or repeats", row(5, 1))
        running.refuses("skips or repeats", row(7, 1))
        running.refuses("skips or repeats", row(6, 0))

    def test_a_token_that_does_not_exist(self, running: Script) -> None:
        running.refuses("has 7 tokens", row(6, 2, max_new=0))

    def test_a_draw_in_mid_prompt(self, script: Script) -> None:
        script.refuses("mid-prompt", row(0, 3, (0,)), admits=(admit(),))

    def test_a_position_without_a_block(self, script: Script) -> None:
        script.refuses("no block for position 5", row(0, 6, (0,)), admits=(admit(),))

    def test_blocks_and_slots_that_do_not_exist(self, script: Script) -> None:
        script.refuses("no block 8", row(0, 6, (0, 8)), admits=(admit(),))
        script.refuses("no slot 3", row(0, 6, (0, 1), slot=3), admits=(admit(slot=3),))

    def test_a_row_of_an_item_that_is_not_in_the_slot(self, running: Script) -> None:
        running.refuses("not in slot 0", row(6, 1, item=9))
        running.refuses("not in slot 1", row(6, 1, slot=1))

    def test_a_prefix_that_was_never_written(self, running: Script) -> None:
        running.refuses("block 5 does not hold", row(4, 2, (6,), item=2, slot=1), admits=(admit(2, 1, blocks=(5,)),))
        other = admit(2, 1, blocks=(0,), first=1)
        running.refuses("block 0 does not hold", row(4, 2, (6,), item=2, slot=1), admits=(other,))
        # The last block is not full: only two of its tokens were written.
        long = admit(2, 1, tokens=9, blocks=(0, 1))
        running.refuses("block 1 does not hold", row(8, 1, (6,), item=2, slot=1), admits=(long,))

    def test_a_prefix_written_in_the_same_step(self, script: Script) -> None:
        second = admit(2, 1, blocks=(0,))
        rows = (row(0, 6, (0, 1)), row(4, 2, (2,), item=2, slot=1))
        script.refuses("block 0 does not hold", *rows, admits=(admit(), second))

    def test_a_prefix_with_nothing_left_to_compute(self, script: Script) -> None:
        script.run(row(0, 8, (0, 1)), admits=(admit(tokens=8),))
        whole = admit(2, 1, tokens=8, blocks=(0, 1))
        script.refuses("no token left", row(7, 1, item=2, slot=1), admits=(whole,))

    def test_a_write_to_a_block_that_belongs_to_another_now(self, running: Script) -> None:
        running.run(row(0, 2, (1,), item=2, slot=1), admits=(admit(2, 1, tokens=2, first=50),))
        running.refuses("not its own", row(6, 1))

    def test_a_block_taken_from_a_row_of_the_same_step(self, running: Script) -> None:
        thief = row(0, 2, (0,), item=2, slot=1)
        running.refuses("block 0 does not hold", row(6, 1), thief, admits=(admit(2, 1, tokens=2, first=50),))

    def test_a_write_to_a_shared_block(self, running: Script) -> None:
        # The row claims to have computed less than its prefix holds.
        running.refuses("skips or repeats", row(3, 3, (6,), item=2, slot=1), admits=(admit(2, 1, blocks=(0,)),))

    def test_the_order_and_the_bounds_of_a_step(self, running: Script) -> None:
        newcomer = admit(2, 1)
        prompt = row(0, 6, (4, 5), item=2, slot=1)
        running.refuses("decodes do not come first", prompt, row(6, 1), admits=(newcomer,))
        running.refuses("too many tokens", row(0, 17, (2, 3, 4, 5, 6), item=2, slot=1), admits=(admit(2, 1, 17),))
        running.refuses("two rows", row(6, 1), row(6, 1))
        running.refuses("0 rows")
        running.refuses("4 rows", one_shot=(OneShotRow(item=3, bucket=0, rows=4),))
        running.refuses("engine other", row(6, 1), engine="other")
        running.refuses("comes after", row(6, 1), step=1)

    def test_a_graph_that_does_not_fit(self, running: Script) -> None:
        running.refuses("graph of 1", row(6, 1), graph_rows=1)
        mixed = (row(6, 1), row(0, 6, (4, 5), item=2, slot=1))
        running.refuses("graph of 2", *mixed, admits=(admit(2, 1),), graph_rows=2)
        running.refuses("graph of 8 tokens", *mixed, admits=(admit(2, 1),), graph_tokens=8)
        running.refuses("graph of 4 tokens", *mixed, admits=(admit(2, 1),), graph_tokens=4)
        running.refuses("graph of 4 tokens", row(6, 1), graph_tokens=4)

    def test_a_sequence_past_the_context(self, script: Script) -> None:
        script.run(row(0, 16, (0, 1, 2, 3), max_new=0), admits=(admit(tokens=20),))
        script.refuses("past the context", row(16, 4, (4,)))

    def test_one_shot_batches_of_mixed_shape(self, script: Script) -> None:
        script.refuses("mixes", one_shot=(OneShotRow(item=1, bucket=0, rows=1), OneShotRow(item=2, bucket=1, rows=1)))
        script.refuses("two rows", one_shot=(OneShotRow(item=1, bucket=0, rows=1),) * 2)
        script.refuses("no rows", one_shot=(OneShotRow(item=1, bucket=0, rows=1), OneShotRow(item=2, bucket=0, rows=0)))

    def test_one_shot_batches_that_are_padded_to_another_size(self) -> None:
        engine = FakeEngine("m", msgspec.structs.replace(CAPACITY, one_shot_rows=(1, 3)))
        plan = StepPlan(step=1, engine="m", one_shot=(OneShotRow(item=1, bucket=0, rows=2),))
        for padded in (0, 2, 4):
            with pytest.raises(BrokenPlanError, match="2 rows are padded to"):
                engine.launch(msgspec.structs.replace(plan, step=2 + padded, padded_rows=padded))
        engine.launch(msgspec.structs.replace(plan, step=9, padded_rows=3))

    def test_closing_with_steps_in_flight(self, script: Script) -> None:
        script.engine.launch(script.plan(row(0, 6, (0, 1)), admits=(admit(),)))
        with pytest.raises(BrokenPlanError, match="in flight"):
            script.engine.close()


def test_only_collect_takes_time() -> None:
    slept: list[float] = []
    engine = FakeEngine("m", CAPACITY, step_seconds=0.25, sleep=slept.append)
    engine.launch(StepPlan(step=1, engine="m", admits=(admit(),), rows=(row(0, 6, (0, 1)),)))
    assert slept == []
    assert engine.collect(1).seconds == 0.25
    assert slept == [0.25]


def test_the_registry_builds_it_from_a_spec() -> None:
    progress: list[LoadProgress] = []
    spec = EngineSpec(
        name="m", kind="fake", max_model_len=100, max_batch=4, max_step_tokens=50, memory_limit=16 * 64 * 9
    )
    engine = create(spec, progress.append)
    assert isinstance(engine, FakeEngine)
    assert engine.capacity == Capacity(blocks=9, block_size=16, max_rows=4, max_step_tokens=50, max_model_len=100)
    assert engine.info.name == "m"
    assert [one.phase for one in progress] == ["allocate"]
    assert create(EngineSpec(name="m", kind="fake"), progress.append).capacity.max_rows > 4
