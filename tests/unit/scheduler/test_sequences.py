"""One rule: computed tokens catch up with known tokens. Capacity of the rig: blocks of 4 tokens, 8 rows, 64 tokens."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from engines.fake import fake_token
from engines.protocol import Capacity, RowResult, StepPlan, StepResult
from server.scheduler.config import SchedulerConfig
from server.worker.wire import Item
from tests.unit.scheduler.rig import SMALL, VOCAB, Rig, shape, with_capacity


def token(item: Item, position: int) -> int:
    return fake_token(item.sampling.seed, item.sampling.choice, position, VOCAB)


class TestPlanning:
    def test_a_short_prompt_is_one_step_and_each_token_another(self) -> None:
        rig = Rig()
        rig.offer(rig.item(range(5), max_tokens=3))
        rig.run()
        assert [shape(plan) for plan in rig.plans] == [[(0, 5, 1)], [(5, 1, 1)], [(6, 1, 1)]]
        rig.check_all()

    def test_the_next_step_is_planned_before_the_token_is_known(self) -> None:
        rig = Rig()
        rig.offer(rig.item(range(5)))
        assert shape(rig.launch()) == [(0, 5, 1)]
        assert shape(rig.launch()) == [(5, 1, 1)]
        assert rig.launch() is None
        assert [update.tokens for update in rig.settle()] == [[token(rig.streams[1000].item, 0)]]
        assert shape(rig.launch()) == [(6, 1, 1)]

    def test_nothing_is_planned_past_the_length(self) -> None:
        rig = Rig()
        rig.offer(rig.item(range(5), max_tokens=1))
        rig.must_launch()
        assert rig.launch() is None
        assert rig.settle()[0].end == "length"
        assert rig.load().blocks_used == 0

    def test_nothing_is_planned_past_the_context(self) -> None:
        rig = with_capacity(max_model_len=10)
        rig.offer(rig.item(range(8), max_tokens=50))
        rig.run()
        assert (len(rig.streams[1000].tokens), rig.streams[1000].end) == (2, "length")
        assert len(rig.plans) == 2

    def test_a_long_prompt_is_chunked_by_the_budget_and_draws_only_at_its_end(self) -> None:
        rig = Rig(SchedulerConfig(token_budget=16))
        rig.offer(rig.item(range(40), max_tokens=1))
        rig.run()
        assert [shape(plan) for plan in rig.plans] == [[(0, 16, 0)], [(16, 16, 0)], [(32, 8, 1)]]
        rig.check_all()

    def test_decodes_come_first_and_prompts_take_what_they_leave(self) -> None:
        rig = Rig(SchedulerConfig(token_budget=16))
        first, second = rig.item(range(30)), rig.item(range(50, 53))
        rig.offer(first)
        rig.offer(second)
        assert shape(rig.launch()) == [(0, 16, 0)]
        assert shape(rig.launch()) == [(16, 14, 1), (0, 2, 0)]
        rig.settle()
        # The rest of the second prompt has the shape of a decode.
        assert shape(rig.launch()) == [(30, 1, 1), (2, 1, 1)]
        rig.settle()
        rig.offer(rig.item(range(60, 90)))
        plan = rig.must_launch()
        assert shape(plan) == [(31, 1, 1), (3, 1, 1), (0, 14, 0)]
        assert sum(row.count for row in plan.rows) == 16
        rig.run()
        rig.check_all()

    def test_residents_never_outnumber_rows_batch_or_budget(self) -> None:
        for rig in (
            with_capacity(max_rows=3),
            Rig(SchedulerConfig(max_batch=3)),
            Rig(SchedulerConfig(token_budget=3)),
            with_capacity(max_step_tokens=3),
        ):
            for start in range(6):
                rig.offer(rig.item([start]))
            rig.run()
            assert max(len(plan.rows) for plan in rig.plans) == 3
            assert {admit.slot for plan in rig.plans for admit in plan.admits} == {0, 1, 2}
            rig.check_all()

    def test_an_earlier_arrival_is_never_overtaken(self) -> None:
        rig = with_capacity(blocks=10)
        rig.offer(rig.item(range(20), max_tokens=4))
        rig.offer(rig.item(range(30, 54), max_tokens=4))
        rig.offer(rig.item([1], max_tokens=4))
        # The second does not fit beside the first; the third would, and waits behind it.
        rig.must_launch()
        assert (rig.load().running, rig.load().waiting, rig.load().waiting_tokens) == (1, 2, 25)
        rig.run()
        order = [admit.item for plan in rig.plans for admit in plan.admits]
        assert order == [1000, 2000, 3000]
        rig.check_all()

    def test_the_graph_is_the_smallest_that_fits_decodes_alone(self) -> None:
        rig = with_capacity(graph_rows=(2, 4))
        for start in range(3):
            rig.offer(rig.item([start, 1, 2], max_tokens=3))
        rig.run()
        assert [plan.graph_rows for plan in rig.plans] == [0, 4, 4]
        for start in range(5):
            rig.offer(rig.item([start, 1, 2], max_tokens=2))
        rig.run()
        assert [plan.graph_rows for plan in rig.plans[3:]] == [0, 0]

    def test_what_fills_a_graph_up_counts_as_work(self) -> None:
        capacity = Capacity(
            blocks=4000,
            block_size=16,
            max_rows=8,
            max_step_tokens=1024,
            max_model_len=2000,
            graph_rows=(4, 8),
            graph_tokens=(128, 512),
        )

        def seconds(plan: StepPlan) -> float:
            tokens = sum(row.count for row in plan.rows)
            return 0.001 + 1e-5 * max(tokens, plan.graph_tokens, plan.graph_rows)

        rig = Rig(SchedulerConfig(prefix_cache=False), {"m": capacity}, seconds)
        for length in (100, 300, 700, 90, 140, 500, 20, 260, 600, 33) * 3:
            rig.offer(rig.item([1] * length, max_tokens=4))
            rig.run()
        assert rig.load().step_error_p95 < 0.02
        rig.offer(rig.item([1] * 400, max_tokens=4))
        padding = []
        for _ in range(3):
            rig.tick()
            rig.tick()
            padding.append(rig.scheduler.settled_work.padding)
        assert padding[0] == 512 - 400
        assert padding[-1] == 4 - 1

    def test_graphs_may_be_captured_later(self) -> None:
        rig = Rig()
        rig.offer(rig.item([1, 2, 3], max_tokens=4))
        rig.must_launch()
        rig.settle()
        assert rig.must_launch().graph_rows == 0
        rig.settle()
        captured = {"m": msgspec.structs.replace(SMALL, graph_rows=(1,))}
        plan = rig.scheduler.plan(rig.now, captured)
        assert plan is not None
        assert plan.graph_rows == 1


class TestEndings:
    def test_a_stop_id_ends_the_item_and_later_tokens_are_dropped(self) -> None:
        rig = Rig()
        plain = rig.item(range(5))
        item = msgspec.structs.replace(
            plain, sampling=msgspec.structs.replace(plain.sampling, stop_token_ids=(token(plain, 0),))
        )
        rig.offer(item)
        rig.must_launch()
        rig.must_launch()
        (update,) = rig.settle()
        assert (update.tokens, update.end) == ([token(item, 0)], "stop")
        assert rig.load().blocks_used == 0
        assert rig.settle() == []
        rig.run()
        rig.check_all()

    def test_a_stop_id_before_min_tokens_is_a_token_like_any_other(self) -> None:
        rig = Rig()
        plain = rig.item(range(5), max_tokens=20)
        stops = (token(plain, 0), token(plain, 3))
        sampling = msgspec.structs.replace(plain.sampling, stop_token_ids=stops, min_tokens=2)
        rig.offer(msgspec.structs.replace(plain, sampling=sampling))
        rig.run()
        stream = rig.streams[1000]
        assert (stream.tokens[-1], stream.end) == (token(plain, 3), "stop")
        assert len(stream.tokens) >= 3

    @pytest.mark.parametrize("budget", [None, 7])
    def test_no_output_computes_the_prompt_only(self, budget: int | None) -> None:
        rig = Rig(SchedulerConfig(token_budget=budget))
        rig.offer(rig.item(range(16), max_tokens=0, prompt_logprobs=1))
        rig.run()
        stream = rig.streams[1000]
        assert (stream.tokens, stream.end, len(stream.updates)) == ([], "length", 1)
        assert sum(row.count for plan in rig.plans for row in plan.rows) == 16
        rig.check_all()

    def test_an_item_that_outgrows_the_pool_alone_ends_with_an_error(self) -> None:
        rig = with_capacity(blocks=4)
        rig.offer(rig.item(range(10), max_tokens=50))
        rig.offer(rig.item(range(20, 30), max_tokens=4))
        rig.run()
        # Four blocks hold 16 tokens; the 17th needs no block, for it is never computed.
        assert [(len(stream.tokens), stream.end) for stream in rig.streams.values()] == [(7, "error"), (4, "length")]
        rig.check_all()

    def test_a_step_that_draws_less_than_it_might_is_made_up_for(self) -> None:
        rig = Rig()
        rig.offer(rig.item(range(8), max_tokens=2))

        def settle(*drawn: int) -> None:
            plan = rig.in_flight.popleft()
            rig.hear(StepResult(step=plan.step, rows=[RowResult(item=1000, tokens=list(drawn))], seconds=0.01))
            rig.check()

        rig.must_launch()
        rig.must_launch()
        settle()
        assert rig.scheduler.plan(rig.now, rig.capacities) is None
        settle()
        # Once nothing is in flight, the last token is computed again: its logits draw the missing one.
        plan = rig.scheduler.plan(rig.now, rig.capacities)
        assert shape(plan) == [(7, 1, 1)]
        assert plan is not None
        rig.in_flight.append(plan)
        settle(9)
        plan = rig.scheduler.plan(rig.now, rig.capacities)
        assert shape(plan) == [(8, 1, 1)]
        assert plan is not None
        rig.in_flight.append(plan)
        settle(10)
        assert (rig.streams[1000].tokens, rig.streams[1000].end) == ([9, 10], "length")

    def test_a_result_of_another_plan_is_an_error(self) -> None:
        rig = Rig()
        rig.offer(rig.item(range(5)))
        plan = rig.must_launch()
        result = rig.engines["m"].collect(plan.step)
        for broken in (
            msgspec.structs.replace(result, step=result.step + 1),
            msgspec.structs.replace(result, rows=[]),
            msgspec.structs.replace(result, rows=[RowResult(item=7, tokens=[1])]),
            msgspec.structs.replace(result, rows=[RowResult(item=1000, tokens=[1, 2])]),
        ):
            other = Rig()
            other.offer(other.item(range(5)))
            other.must_launch()
            with pytest.raises(ValueError, match="step"):
                other.scheduler.settle(broken, other.now)


class TestCancel:
    def test_a_waiting_item_never_runs(self) -> None:
        rig = Rig(SchedulerConfig(max_batch=1))
        rig.offer(rig.item(range(5)))
        rig.offer(rig.item(range(6)))
        rig.must_launch()
        rig.cancel(2000)
        rig.run()
        assert {row.item for plan in rig.plans for row in plan.rows} == {1000}
        rig.check_all()

    def test_a_running_item_gives_its_blocks_back_at_once(self) -> None:
        rig = Rig()
        rig.offer(rig.item(range(5)))
        rig.offer(rig.item(range(6)))
        rig.must_launch()
        rig.must_launch()
        rig.cancel(1000)
        assert rig.load().blocks_used == 2
        rig.check()
        rig.settle()
        rig.run()
        rig.check_all()

    def test_slot_and_blocks_serve_another_item_while_the_cancelled_one_is_in_flight(self) -> None:
        rig = with_capacity(blocks=2, max_rows=1)
        rig.offer(rig.item(range(5)))
        rig.offer(rig.item(range(10, 15), max_tokens=3))
        rig.must_launch()
        rig.cancel(1000)
        plan = rig.must_launch()
        assert (plan.rows[0].item, plan.rows[0].slot, sorted(plan.rows[0].new_blocks)) == (2000, 0, [0, 1])
        rig.run()
        rig.check_all()

    def test_what_is_unknown_or_gone_is_ignored(self) -> None:
        rig = Rig()
        rig.offer(rig.item(range(5), max_tokens=1))
        rig.run()
        rig.cancel(1000, 1000, 77)
        rig.check_all()


class TestReplay:
    @pytest.mark.parametrize("sent", [1, 5, 11])
    def test_the_same_stream_goes_on(self, sent: int) -> None:
        rig = Rig()
        item = rig.item(range(6), max_tokens=12)
        tokens = [*item.tokens, *(token(item, position) for position in range(sent))]
        rig.offer(msgspec.structs.replace(item, tokens=tokens))
        assert shape(rig.launch()) == [(0, 6 + sent, 1)]
        rig.run()
        assert rig.streams[1000].updates[0].first_index == sent
        rig.check_all()

    def test_one_whose_end_was_lost_ends_without_a_token(self) -> None:
        rig = Rig()
        item = rig.item(range(6), max_tokens=2)
        rig.offer(msgspec.structs.replace(item, tokens=[*item.tokens, token(item, 0), token(item, 1)]))
        rig.run()
        assert (rig.streams[1000].tokens, rig.streams[1000].end) == ([], "length")
        rig.check_all()


def test_queue_time_is_told_once() -> None:
    rig = Rig(SchedulerConfig(max_batch=1))
    rig.offer(rig.item(range(5), max_tokens=2, waited=3.0))
    rig.offer(rig.item(range(5), max_tokens=2))
    rig.run()
    waits = [[update.queue_seconds for update in stream.updates] for stream in rig.streams.values()]
    assert waits == [[0.0, 0.0], [pytest.approx(0.02), 0.0]]


def test_the_size_of_a_settled_step_is_told() -> None:
    rig = Rig(SchedulerConfig(token_budget=8))
    rig.offer(rig.item(range(6), max_tokens=4))
    rig.must_launch()
    rig.offer(rig.item(range(20, 30), max_tokens=1))
    rig.must_launch()
    sizes = []
    for _ in range(2):
        rig.settle()
        work = rig.scheduler.settled_work
        sizes.append(dataclasses.astuple(work)[:5])
    assert sizes == [(1, 6, 6, 0.0, 21.0), (2, 8, 7, 7.0, 28.0)]
