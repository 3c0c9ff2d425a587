from __future__ import annotations

import pytest

from engines.protocol import Capacity, SamplingParams
from server.scheduler.items import SequenceState
from server.scheduler.residents import Residents
from server.worker.wire import Item

CAPACITY = Capacity(blocks=8, block_size=4, max_rows=3, max_step_tokens=16, max_model_len=32)


def state(number: int, prompt: int = 6) -> SequenceState:
    tokens = list(range(number, number + prompt))
    sampling = SamplingParams(seed=number)
    item = Item(
        item=number,
        request=number,
        engine="m",
        tokens=tokens,
        prompt_length=prompt,
        max_tokens=8,
        sampling=sampling,
    )
    return SequenceState(item, number, 0.0, prompt + 8, "length", b"root", CAPACITY.block_size)


@pytest.fixture
def residents() -> Residents:
    residents = Residents(CAPACITY, 3, prefix_cache=True)
    for number in (5, 2):
        assert residents.place(state(number)) == 0
    assert residents.integrity() == []
    return residents


def test_residents_are_in_the_order_of_arrival_and_slots_fill_from_below(residents: Residents) -> None:
    assert [(one.arrival, one.slot) for one in residents] == [(2, 1), (5, 0)]
    residents.vacate(residents.latest())
    assert residents.place(state(9)) == 0
    assert [(one.arrival, one.slot) for one in residents] == [(2, 1), (9, 0)]


def test_a_newcomer_leaves_a_block_for_each_resident(residents: Residents) -> None:
    # Four blocks are left: the two residents need one each.
    assert residents.place(state(20, prompt=9)) is None
    assert residents.place(state(20, prompt=8)) == 0
    assert residents.full


def test_the_block_of_the_last_settled_token_is_not_findable(residents: Residents) -> None:
    resident = residents.latest()
    resident.computed = 6
    residents.commit(resident)
    assert resident.committed == 1
    # The token at position 7 fills the second block; its step may be in flight still.
    resident.tokens += [1, 2]
    resident.computed = 8
    residents.commit(resident)
    assert resident.committed == 1
    resident.tokens.append(3)
    residents.commit(resident)
    assert resident.committed == 2


def test_integrity_finds_each_kind_of_contradiction(residents: Residents) -> None:
    earlier, later = residents
    lost = later.blocks.pop()
    assert any(f"block {lost} " in text for text in residents.integrity())
    later.blocks.append(lost)
    later.slot = earlier.slot
    assert any("slots" in text for text in residents.integrity())
    later.slot = 0
    earlier.computed = 9
    assert any("computed" in text for text in residents.integrity())
    earlier.computed = 0
    earlier.arrival = 6
    assert any("order" in text for text in residents.integrity())
    earlier.arrival = 2
    assert residents.integrity() == []
