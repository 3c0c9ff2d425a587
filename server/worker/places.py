"""Every choice that has not ended: where its tokens go, and which worker computes it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from server.requests import Reply
from server.worker.wire import Item, ToWorker


class Carrier(Protocol):
    """What computes items: a worker, as far as it matters where items go."""

    def serves(self, engine: str, version: int) -> bool:
        """This version of the engine is loaded there and takes items."""

    def send(self, message: ToWorker) -> None:
        """Raises Overloaded when the worker is gone or does not keep up."""


@dataclass(slots=True, eq=False)
class Place:
    """One choice of a reply. Its number is unique in the life of this process."""

    item: int
    reply: Reply
    choice: int
    version: int = 0
    """Of the model, which a reload raises: what was tokenized for one version is computed by no other."""
    carrier: Carrier | None = None
    """None: it waits for one."""
    last_token_at: float | None = None

    @property
    def model(self) -> str:
        return self.reply.request.model

    def to_item(self, now: float, *, suspect: bool = False) -> Item:
        """Carries the choice on from its log: prompt, then the tokens so far, of which a new one has none."""
        request = self.reply.request
        return Item(
            item=self.item,
            request=request.id,
            engine=request.model,
            tokens=[*request.prompt, *self.reply.logs[self.choice].tokens],
            prompt_length=len(request.prompt),
            max_tokens=request.max_tokens,
            sampling=request.sampling[self.choice],
            prompt_logprobs=request.prompt_logprobs,
            cache_salt=request.cache_salt,
            waited=max(0.0, now - request.arrived),
            priority=request.priority,
            tenant=request.tenant,
            weight=request.weight,
            ttft=request.ttft,
            tpot=request.tpot,
            firm=request.firm,
            timeout=request.timeout,
            suspect=suspect,
            rows=request.rows,
            bucket=request.bucket,
        )


class Places:
    """All places by item, by reply and by carrier; those that wait are in the order of their requests."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._by_item: dict[int, Place] = {}
        self._by_reply: dict[Reply, dict[int, Place]] = {}
        self._loads: dict[Carrier, int] = {}

    @property
    def replies(self) -> list[Reply]:
        """Not closed yet."""
        return list(self._by_reply)

    def __len__(self) -> int:
        """Replies that are not closed yet."""
        return len(self._by_reply)

    def add(self, reply: Reply, version: int = 0) -> list[Place]:
        """A place for each choice; the reply stays known until ``close``."""
        places = {choice: Place(next(self._numbers), reply, choice, version) for choice in range(len(reply.ends))}
        self._by_reply[reply] = places
        self._by_item.update({place.item: place for place in places.values()})
        return list(places.values())

    def close(self, reply: Reply) -> None:
        """Forget the reply; its places must have been removed."""
        self._by_reply.pop(reply, None)

    def at(self, carrier: Carrier, item: int) -> Place | None:
        """None where the item has ended or is computed elsewhere by now."""
        place = self._by_item.get(item)
        return place if place is not None and place.carrier is carrier else None

    def of(self, reply: Reply) -> list[Place]:
        return list(self._by_reply.get(reply, {}).values())

    def choice(self, reply: Reply, choice: int) -> Place | None:
        return self._by_reply.get(reply, {}).get(choice)

    def on(self, carrier: Carrier) -> list[Place]:
        return [place for place in self._by_item.values() if place.carrier is carrier]

    def holds(self, model: str, version: int) -> bool:
        """Some choice of this version of the model has not ended."""
        return any(place.model == model and place.version == version for place in self._by_item.values())

    def load(self, carrier: Carrier) -> int:
        """Choices that this carrier computes."""
        return self._loads.get(carrier, 0)

    def waiting(self) -> dict[Reply, list[Place]]:
        """Places without a carrier, by reply, in the order in which the replies came."""
        found: dict[Reply, list[Place]] = {}
        for reply, places in self._by_reply.items():
            if lost := [place for place in places.values() if place.carrier is None]:
                found[reply] = lost
        return found

    def move(self, places: Iterable[Place], carrier: Carrier | None) -> None:
        for place in places:
            if place.carrier is not None:
                self._loads[place.carrier] -= 1
            place.carrier = carrier
            if carrier is not None:
                self._loads[carrier] = self._loads.get(carrier, 0) + 1

    def renumber(self, place: Place) -> None:
        """From here on news under its old number is nobody's; it waits for a carrier."""
        self.move([place], None)
        del self._by_item[place.item]
        place.item = next(self._numbers)
        self._by_item[place.item] = place

    def remove(self, place: Place) -> None:
        """The choice has ended: nothing more is delivered to it. Idempotent."""
        if self._by_item.pop(place.item, None) is not None:
            self.move([place], None)
            self._by_reply[place.reply].pop(place.choice, None)

    def forget(self, carrier: Carrier) -> None:
        """It will never come back, and computes nothing."""
        self._loads.pop(carrier, None)
