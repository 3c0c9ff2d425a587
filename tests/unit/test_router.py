from __future__ import annotations

from collections.abc import Iterator

import pytest

from engines.protocol import SamplingParams
from server.errors import Overloaded
from server.requests import Reply, Request
from server.worker.places import Place, Places
from server.worker.router import Router
from server.worker.wire import Cancel, Item, Offer, ToWorker


class Worker:
    """Keeps what it is sent."""

    def __init__(self, *models: str) -> None:
        self.models = set(models)
        self.version = 0
        self.offers: list[list[Item]] = []
        self.cancelled: list[int] = []
        self.full = False

    def serves(self, engine: str, version: int) -> bool:
        return engine in self.models and version == self.version

    def send(self, message: ToWorker) -> None:
        if self.full:
            raise Overloaded("full")
        match message:
            case Offer(items):
                self.offers.append(items)
            case Cancel(items):
                self.cancelled += items

    def taken(self) -> list[Item]:
        """All offered items since the last call."""
        items = [item for offer in self.offers for item in offer]
        self.offers.clear()
        return items


class Rig:
    """A router over two workers, and requests numbered from 0."""

    def __init__(self) -> None:
        self.workers = [Worker("m"), Worker("m", "other")]
        self.places = Places()
        self.router = Router(self.places, lambda _: self.workers, lambda: 12.5)
        self.replies: list[Reply] = []

    def ask(self, choices: int = 1, model: str = "m", version: int = 0) -> Reply:
        sampling = tuple(SamplingParams(seed=3, choice=choice) for choice in range(choices))
        reply = Reply(
            Request(len(self.replies), model, [1, 2, 3], 8, sampling, arrived=12.0, cache_salt="t", prompt_logprobs=2),
            lambda _: None,
        )
        self.replies.append(reply)
        self.router.file(reply, version)
        return reply

    def token(self, reply: Reply, choice: int = 0) -> None:
        place = self.place(reply, choice)
        reply.deliver(choice, len(reply.logs[choice].tokens), [9], "", now=13.0)
        self.router.delivered(place)

    def place(self, reply: Reply, choice: int = 0) -> Place:
        place = self.places.choice(reply, choice)
        assert place is not None
        return place

    def die(self, worker: Worker, *replies: Reply) -> int | None:
        """It dies with these in launched steps, and comes back; the guilty item."""
        models, worker.models = worker.models, set()
        launched = [place.item for reply in replies for place in self.places.of(reply)]
        verdict, stranded = self.router.lost(worker, launched)
        for place in stranded:
            if place.item == verdict.guilty:
                self.router.ended(place)
        self.router.offer_waiting()
        worker.models = models
        self.router.offer_waiting()
        return verdict.guilty


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    for worker in rig.workers:
        assert rig.places.load(worker) == len(rig.places.on(worker))


@pytest.fixture
def single(rig: Rig) -> Rig:
    """With one worker."""
    del rig.workers[1]
    return rig


def test_a_new_reply_is_one_offer_with_an_item_a_choice(rig: Rig) -> None:
    rig.ask(choices=2)
    [[first, second]] = rig.workers[0].offers
    assert (first.sampling.choice, second.sampling.choice) == (0, 1)
    assert first.item != second.item
    for item in (first, second):
        assert (item.request, item.engine, item.cache_salt, item.prompt_logprobs) == (0, "m", "t", 2)
        assert (item.tokens, item.prompt_length, item.max_tokens, item.waited) == ([1, 2, 3], 3, 8, 0.5)
        assert not item.suspect


def test_the_least_loaded_worker_that_serves_the_model_gets_it(rig: Rig) -> None:
    rig.ask(choices=3)
    rig.ask()
    rig.ask()
    assert [len(worker.taken()) for worker in rig.workers] == [3, 2]
    rig.ask(model="other")
    assert [len(worker.taken()) for worker in rig.workers] == [0, 1]


def test_a_reply_that_its_worker_has_no_room_for_is_refused_and_forgotten(rig: Rig) -> None:
    rig.workers[0].full = True
    with pytest.raises(Overloaded):
        rig.ask()
    assert not rig.places
    assert rig.places.load(rig.workers[0]) == 0


def test_what_a_dead_worker_had_goes_on_from_its_log_at_another_one(rig: Rig) -> None:
    reply = rig.ask(choices=3)
    rig.token(reply, 0)
    rig.token(reply, 0)
    reply.deliver(1, 0, [7], "stop", now=13.0)
    rig.router.ended(rig.place(reply, 1))
    numbers = [rig.place(reply, choice).item for choice in (0, 2)]
    rig.die(rig.workers[0])
    items = rig.workers[1].taken()
    assert [(item.item, item.sampling.choice, item.tokens) for item in items] == [
        (numbers[0], 0, [1, 2, 3, 9, 9]),
        (numbers[1], 2, [1, 2, 3]),
    ]
    assert all(item.prompt_length == 3 for item in items)


def test_without_a_ready_worker_all_waits_in_the_order_it_came(single: Rig) -> None:
    [worker] = single.workers
    first = single.ask()
    worker.models.clear()
    single.die(worker)
    second = single.ask()
    worker.taken()
    single.router.offer_waiting()
    assert worker.taken() == []
    worker.models.add("m")
    single.router.offer_waiting()
    assert [item.request for item in worker.taken()] == [first.request.id, second.request.id]
    single.router.offer_waiting()
    assert worker.taken() == [], "it is offered once"


def test_news_of_a_worker_that_has_lost_the_item_finds_no_place(rig: Rig) -> None:
    reply = rig.ask()
    number = rig.place(reply).item
    rig.die(rig.workers[0])
    assert rig.places.at(rig.workers[0], number) is None
    assert rig.places.at(rig.workers[1], number) is rig.place(reply)


def test_a_replay_that_a_worker_has_no_room_for_waits_for_the_next_chance(single: Rig) -> None:
    [worker] = single.workers
    single.ask()
    single.ask()
    worker.taken()
    worker.full = True
    single.die(worker)
    worker.full = False
    single.router.offer_waiting()
    assert [item.request for item in worker.taken()] == [0, 1]


def test_who_is_cancelled_while_it_waits_is_never_offered(single: Rig) -> None:
    [worker] = single.workers
    reply = single.ask()
    worker.taken()
    worker.models.clear()
    single.die(worker)
    single.router.cancel(single.places.of(reply))
    worker.models.add("m")
    single.router.offer_waiting()
    assert worker.taken() == []
    assert worker.cancelled == []


def test_two_deaths_without_a_token_make_suspects_that_run_one_at_a_time(single: Rig) -> None:
    [worker] = single.workers
    first, second, third = single.ask(), single.ask(), single.ask()
    single.die(worker, first, second)
    worker.taken()
    single.die(worker, first, second)
    items = worker.taken()
    assert {item.request: item.suspect for item in items} == {third.request.id: False, first.request.id: True}
    # The first is innocent: it goes on among the others, under a new number, and the second is tried.
    old = single.place(first).item
    single.token(first)
    assert worker.cancelled == [old]
    assert single.place(first).item != old
    items = worker.taken()
    assert {item.request: item.suspect for item in items} == {first.request.id: False, second.request.id: True}
    assert next(item for item in items if not item.suspect).tokens == [1, 2, 3, 9]


def test_the_suspect_that_kills_alone_is_guilty_and_the_next_is_tried(single: Rig) -> None:
    [worker] = single.workers
    first, second = single.ask(), single.ask()
    single.die(worker, first, second)
    assert single.die(worker, first, second) is None
    worker.taken()
    number = single.place(first).item
    assert single.die(worker, first) == number
    assert [(item.request, item.suspect) for item in worker.taken()] == [(second.request.id, True)]


def test_a_suspect_that_shared_the_last_steps_is_not_guilty(single: Rig) -> None:
    [worker] = single.workers
    first, second = single.ask(), single.ask()
    for _ in range(5):
        assert single.die(worker, first, second) is None


def test_an_item_that_ended_in_the_step_still_counts_as_company(single: Rig) -> None:
    [worker] = single.workers
    reply = single.ask()
    for _ in range(2):
        single.die(worker, reply)
    verdict, _ = single.router.lost(worker, [single.place(reply).item, 999])
    assert verdict.guilty is None


def test_a_suspect_that_is_cancelled_makes_room_for_the_next(single: Rig) -> None:
    [worker] = single.workers
    first, second = single.ask(), single.ask()
    for _ in range(2):
        single.die(worker, first, second)
    worker.taken()
    single.router.cancel(single.places.of(first))
    assert [(item.request, item.suspect) for item in worker.taken()] == [(second.request.id, True)]


def test_each_worker_tries_one_suspect(rig: Rig) -> None:
    first, second = rig.workers
    second.models.clear()
    replies = [rig.ask(), rig.ask(), rig.ask()]
    for _ in range(2):
        first.taken()
        rig.die(first, *replies)
    assert [item.request for item in first.taken() if item.suspect] == [0]
    second.models.add("m")
    rig.router.offer_waiting()
    assert [(item.request, item.suspect) for item in second.taken()] == [(1, True)]
    assert first.taken() == []


def test_each_version_of_a_model_has_its_own_workers(rig: Rig) -> None:
    old, new = rig.workers
    new.version = 1
    rig.ask()
    rig.ask(version=1)
    rig.ask(version=2)
    assert [[item.request for item in worker.taken()] for worker in rig.workers] == [[0], [1]]
    assert rig.places.holds("m", 2)
    assert not rig.places.holds("m", 3)
    old.version = 2
    rig.router.offer_waiting()
    assert [item.request for item in old.taken()] == [2]


def test_what_a_worker_is_to_forget_goes_on_under_new_numbers(single: Rig) -> None:
    [worker] = single.workers
    replies = [single.ask(), single.ask()]
    single.token(replies[0])
    old = [item.item for item in worker.taken()]
    single.router.reoffer(worker, single.places.on(worker))
    items = worker.taken()
    assert [item.tokens for item in items] == [[1, 2, 3, 9], [1, 2, 3]]
    assert not {item.item for item in items} & set(old)
    assert all(single.places.at(worker, number) is None for number in old)


def test_a_choice_that_ended_with_the_last_message_is_not_computed_again(single: Rig) -> None:
    [worker] = single.workers
    reply = single.ask(choices=2)
    worker.taken()
    reply.deliver(0, 0, [9], "stop", now=13.0)
    single.die(worker)
    assert [item.sampling.choice for item in worker.taken()] == [1]
