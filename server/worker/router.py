"""Which worker computes which choice: new ones, those of a dead worker, and suspects, who run one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable

from server.errors import Overloaded
from server.requests import Reply
from server.worker.blame import Blame, Verdict
from server.worker.places import Carrier, Place, Places
from server.worker.wire import Cancel, Offer

log = logging.getLogger(__name__)


class Router:
    """Keeps every open choice on a worker that serves its model, as soon as there is one.

    What a dead worker leaves is offered again from its log, to another worker of the model at once or to the next one
    that becomes ready; until then it waits here, as new requests do. Each worker has at most one suspect at a time.
    """

    def __init__(
        self, places: Places, carriers: Callable[[str], Iterable[Carrier]], clock: Callable[[], float]
    ) -> None:
        """``carriers`` gives the workers that hold, or will hold, a model."""
        self._places = places
        self._carriers = carriers
        self._clock = clock
        self._blame = Blame()
        self._trials: dict[Carrier, Place] = {}

    def file(self, reply: Reply, version: int = 0) -> None:
        """Send a new reply's choices to the least loaded worker; they wait where none is ready.

        Raises Overloaded, and forgets the reply, when that worker does not keep up.
        """
        places = self._places.add(reply, version)
        carrier = self._least_loaded(places[0])
        try:
            if carrier is not None:
                self._offer(carrier, places)
        except Overloaded:
            for place in places:
                self._places.remove(place)
            self._places.close(reply)
            raise

    def lost(self, carrier: Carrier, launched: Collection[int]) -> tuple[Verdict, list[Place]]:
        """A worker died while these items were in launched steps: all it had waits now, for ``offer_waiting``.

        Returns who was blamed, and all places that were there.
        """
        for place in self._places.on(carrier):
            # What came with the last message, if that broke off half-way.
            if place.reply.ends[place.choice]:
                self.ended(place)
        stranded = self._places.on(carrier)
        present = [place.item for place in stranded if place.item in launched]
        verdict = self._blame.died(present, alone=len(launched) == 1)
        self._places.move(stranded, None)
        self._trials.pop(carrier, None)
        return verdict, stranded

    def offer_waiting(self) -> None:
        """Give what waits to workers that are ready; called whenever one may have become so."""
        try:
            for places in self._places.waiting().values():
                clean = [place for place in places if not self._blame.suspects(place.item)]
                carrier = self._least_loaded(places[0])
                if carrier is not None and clean:
                    self._offer(carrier, clean)
                for place in places:
                    if self._blame.suspects(place.item):
                        self._try(place)
        except Overloaded:
            log.warning("a worker does not keep up with what is offered to it again; the rest waits")

    def delivered(self, place: Place) -> None:
        """It had a token, which clears it of all blame; a suspect goes on among the others."""
        self._blame.forget(place.item)
        carrier = place.carrier
        if carrier is None or self._trials.get(carrier) is not place:
            return
        # The worker knows it as a suspect. It is offered again under a new number, so that tokens which it still
        # draws under the old one cannot mix with those that the new one draws.
        del self._trials[carrier]
        self.tell_cancelled(carrier, [place.item])
        self._places.renumber(place)
        self.offer_waiting()

    def reoffer(self, carrier: Carrier, places: Iterable[Place]) -> None:
        """These are taken from the worker, which has forgotten them or is to, and go on from their logs.

        Under new numbers, so that what the worker still says of the old ones is nobody's.
        """
        for place in places:
            self._blame.forget(place.item)
            self._places.renumber(place)
            if self._trials.get(carrier) is place:
                del self._trials[carrier]
        self.offer_waiting()

    def ended(self, place: Place) -> None:
        """It needs no worker any more. Idempotent."""
        self._blame.forget(place.item)
        carrier = place.carrier
        self._places.remove(place)
        if carrier is not None and self._trials.get(carrier) is place:
            del self._trials[carrier]
            self.offer_waiting()

    def cancel(self, places: Iterable[Place]) -> None:
        """End these from this side."""
        by_carrier: dict[Carrier, list[int]] = {}
        for place in places:
            if place.carrier is not None:
                by_carrier.setdefault(place.carrier, []).append(place.item)
            self.ended(place)
        for carrier, items in by_carrier.items():
            self.tell_cancelled(carrier, items)

    def _try(self, place: Place) -> None:
        """Offer a suspect where no other one is."""
        for carrier in self._ready(place):
            if carrier not in self._trials:
                self._offer(carrier, [place], suspect=True)
                self._trials[carrier] = place
                return

    def _offer(self, carrier: Carrier, places: list[Place], *, suspect: bool = False) -> None:
        now = self._clock()
        inputs = [place.reply.request.inputs for place in places if place.reply.request.rows]
        carrier.send(Offer([place.to_item(now, suspect=suspect) for place in places], inputs))
        self._places.move(places, carrier)
        for reply in {place.reply for place in places}:
            reply.offered_at.append(now)

    def tell_cancelled(self, carrier: Carrier, items: list[int]) -> None:
        """The worker need not compute these any more."""
        try:
            carrier.send(Cancel(items))
        except Overloaded as error:
            log.warning("a cancel was not sent: %s", error.log)

    def _least_loaded(self, place: Place) -> Carrier | None:
        return min(self._ready(place), key=self._places.load, default=None)

    def _ready(self, place: Place) -> list[Carrier]:
        return [carrier for carrier in self._carriers(place.model) if carrier.serves(place.model, place.version)]
