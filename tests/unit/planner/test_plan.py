"""Lifetimes, offsets and the replay that checks them, on graphs made by hand and at random."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.planner.lifetimes import Graph, Step, storages
from engines.planner.plan import ALIGNMENT, MemoryPlan, PlanError, live_bytes, plan_memory, replay


def step(op: str, inputs: str, output: str) -> Step:
    return Step(name=output, op=op, inputs=tuple(inputs.split()), outputs=(output,))


def graph(*steps: Step, size: int = 1024, outputs: str = "", **sizes: int) -> Graph:
    every = {name: sizes.get(name, size) for each in steps for name in each.outputs}
    return Graph(steps=steps, sizes=every, outputs=frozenset(outputs.split() or steps[-1].outputs))


def shared(found: Graph) -> set[frozenset[str]]:
    return {frozenset(storage.tensors) for storage in storages(found)}


def test_a_chain_needs_two_buffers_and_an_elementwise_one_only_one() -> None:
    chain = [step("Conv", "x w", "a"), step("Conv", "a w", "b"), step("Conv", "b w", "c"), step("Conv", "c w", "d")]
    plan = plan_memory(graph(*chain))
    assert (plan.unshared, plan.peak, plan.floor) == (4096, 2048, 2048)
    elementwise = [step("Relu", before, after) for before, after in zip("xabc", "abcd", strict=True)]
    assert plan_memory(graph(*elementwise)).peak == 1024


def test_a_residual_is_kept_until_its_sum() -> None:
    block = graph(step("Conv", "x w", "a"), step("Conv", "a w", "b"), step("Conv", "b w", "c"), step("Add", "c a", "d"))
    assert plan_memory(block).peak == 3072
    assert shared(block) == {frozenset("a"), frozenset("b"), frozenset("cd")}


def test_a_view_is_free_and_keeps_its_source_alive() -> None:
    viewed = graph(
        step("Conv", "x w", "a"), step("Reshape", "a n", "v"), step("Relu", "a", "r"), step("MatMul", "v r", "out")
    )
    # Relu may not write over ``a``: ``v`` is read after it.
    assert shared(viewed) == {frozenset("av"), frozenset("r"), frozenset(["out"])}


def test_two_views_of_one_tensor_are_not_added_in_place() -> None:
    found = graph(
        step("Conv", "x w", "a"), step("Transpose", "a", "t"), step("Reshape", "a n", "v"), step("Add", "a v", "s")
    )
    assert frozenset("avs") not in shared(found)
    assert shared(graph(step("Conv", "x w", "a"), step("Mul", "a a", "s"))) == {frozenset("as")}


def test_outputs_are_never_written_over_and_live_to_the_end() -> None:
    found = graph(step("Conv", "x w", "a"), step("Relu", "a", "b"), step("Conv", "b w", "c"), outputs="a c")
    assert shared(found) == {frozenset("a"), frozenset("b"), frozenset("c")}
    assert next(each.last for each in storages(found) if each.tensors == ("a",)) == 3


def test_a_fused_sum_takes_the_place_of_what_it_is_added_to() -> None:
    found = graph(step("Conv", "x w", "a"), Step(name="f", op="FusedConv", inputs=("y", "w", "", "a"), outputs=("b",)))
    assert shared(found) == {frozenset("ab")}


def test_inputs_and_views_of_them_take_nothing_and_are_not_written_over() -> None:
    found = graph(step("Reshape", "x n", "v"), step("Relu", "v", "r"), v=0)
    assert shared(found) == {frozenset("r")}
    assert plan_memory(graph(step("Shape", "x", "n"), n=0)).peak == 0


def test_the_replay_finds_an_overlap() -> None:
    block = graph(step("Conv", "x w", "a"), step("Conv", "a w", "b"), step("Add", "b a", "c"))
    good = plan_memory(block)
    with pytest.raises(PlanError, match="reads a after"):
        replay(block, dataclasses.replace(good, offsets=(0,) * len(good.offsets)))


def test_the_replay_finds_a_lifetime_that_is_too_short() -> None:
    block = graph(step("Conv", "x w", "a"), step("Conv", "x w", "b"), step("Conv", "b w", "c"), step("Add", "c a", "d"))
    wrong = [dataclasses.replace(each, last=0) if "a" in each.tensors else each for each in storages(block)]
    assert wrong != storages(block)
    offsets = tuple(0 if "a" in each.tensors else at * 1024 for at, each in enumerate(wrong, -1))
    with pytest.raises(PlanError, match="reads a after"):
        replay(block, MemoryPlan(storages=tuple(wrong), offsets=offsets, peak=4096, unshared=0, floor=0))


OPS = st.sampled_from(["Conv", "MatMul", "Relu", "Add", "Reshape", "Softmax"])


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    names, steps = ["x"], []
    sizes: dict[str, int] = {}
    for at in range(draw(st.integers(1, 24))):
        op, name = draw(OPS), f"t{at}"
        inputs = tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)))
        steps.append(Step(name=name, op=op, inputs=inputs, outputs=(name,)))
        same = op in ("Reshape", "Relu") and inputs[0] in sizes
        sizes[name] = sizes[inputs[0]] if same else draw(st.sampled_from([1, 64, 200, 1024, 5000]))
        names.append(name)
    outputs = draw(st.sets(st.sampled_from(names[1:]), min_size=1, max_size=3))
    return Graph(steps=tuple(steps), sizes=sizes, outputs=frozenset(outputs))


@given(graphs())
def test_every_plan_passes_its_replay_between_its_bounds(found: Graph) -> None:
    plan = plan_memory(found)  # replays
    assert plan.floor <= plan.peak <= plan.unshared
    assert all(offset % ALIGNMENT == 0 for offset in plan.offsets)
    assert max(live_bytes(plan.storages)) == plan.floor
    together = [
        (one, other)
        for one in range(len(plan.storages))
        for other in range(one)
        if plan.storages[one].first <= plan.storages[other].last
        and plan.storages[other].first <= plan.storages[one].last
    ]
    for one, other in together:
        first, second = sorted((one, other), key=lambda at: plan.offsets[at])
        assert plan.offsets[first] + plan.storages[first].nbytes <= plan.offsets[second]
