from __future__ import annotations

from collections.abc import Callable

import pytest

from engines.protocol import Capacity, SamplingParams
from server.scheduler.config import SchedulerConfig
from server.scheduler.deadlines import aim_of
from server.scheduler.fairness import Account
from server.scheduler.items import SequenceState
from server.scheduler.residents import IMMUNE, Residents
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
    aim = aim_of(item, SchedulerConfig())
    return SequenceState(item, number, 0.0, prompt + 8, "length", b"root", CAPACITY.block_size, aim, Account(""))


def last(residents: Residents) -> SequenceState:
    return list(residents)[-1]


@pytest.fixture
def residents() -> Residents:
    residents = Residents(CAPACITY, 3, prefix_cache=True)
    for number in (5, 2):
        assert residents.place(state(number)) == 0
    assert residents.integrity() == []
    return residents


def test_residents_are_in_the_order_of_arrival_and_slots_fill_from_below(residents: Residents) -> None:
    assert [(one.arrival, one.slot) for one in residents] == [(2, 1), (5, 0)]
    residents.vacate(last(residents))
    assert residents.place(state(9)) == 0
    assert [(one.arrival, one.slot) for one in residents] == [(2, 1), (9, 0)]


def test_a_newcomer_leaves_blocks_for_the_residents_to_grow(residents: Residents) -> None:
    # Four blocks are left: one for each resident, and half of the two that they will want of four more tokens each.
    assert residents.place(state(20, prompt=5)) is None
    assert not residents.fits(state(20, prompt=5))
    assert residents.fits(state(20, prompt=4))
    assert residents.place(state(20, prompt=4)) == 0
    assert residents.full


def test_what_residents_will_want_is_learned_from_those_that_ended(residents: Residents) -> None:
    residents.ended(0)
    assert residents.place(state(20, prompt=8)) == 0


class TestVictim:
    def cost(self, costs: dict[int, float]) -> Callable[[SequenceState], float]:
        return lambda one: costs[one.arrival]

    def three(self) -> tuple[Residents, list[SequenceState]]:
        residents = Residents(CAPACITY, 3, prefix_cache=True)
        for number in (1, 2, 3):
            assert residents.place(state(number, prompt=3)) == 0
        return residents, list(residents)

    def test_the_one_who_is_hurt_least_gives_way(self) -> None:
        residents, (first, second, third) = self.three()
        assert residents.victim(first, self.cost({2: -5.0, 3: 1.0})) is second
        assert residents.victim(first, self.cost({2: 2.0, 3: 1.0})) is third
        assert residents.victim(second, self.cost({3: 1.0})) is third
        assert residents.victim(third, self.cost({})) is None

    def test_the_lowest_class_gives_way_first(self) -> None:
        residents, (first, second, third) = self.three()
        residents.vacate(second)
        second.rank = 2
        assert residents.place(second) == 0
        assert list(residents) == [first, third, second]
        assert residents.victim(first, self.cost({2: 9.0, 3: 1.0})) is second
        assert residents.lower(1, self.cost({2: 9.0})) is second
        assert residents.lower(2, self.cost({})) is None
        assert residents.lowest_rank == 2

    def test_the_immune_are_spared_but_by_the_most_senior(self) -> None:
        residents, (first, second, third) = self.three()
        third.preempted = IMMUNE
        assert residents.victim(second, self.cost({3: 1.0})) is None
        second.preempted = IMMUNE
        assert residents.victim(first, self.cost({2: 5.0, 3: 1.0})) is third
        first.preempted = IMMUNE
        assert residents.lower(0, self.cost({})) is None


def test_the_block_of_the_last_settled_token_is_not_findable(residents: Residents) -> None:
    resident = last(residents)
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
