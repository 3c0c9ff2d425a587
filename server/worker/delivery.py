"""From what a step gave to the replies: tokens into their logs, times into the metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from engines.protocol import End
from server.admission import Door
from server.errors import InvalidRequest
from server.metrics import Metrics
from server.requests import Reply
from server.worker.places import Carrier, Place, Places
from server.worker.wire import StepOutputs


class Delivery:
    """Brings tokens to the replies that still want them."""

    def __init__(self, places: Places, metrics: Metrics, door: Door, clock: Callable[[], float]) -> None:
        self._places = places
        self._metrics = metrics
        self._door = door
        self._clock = clock

    def deliver(self, carrier: Carrier, outputs: StepOutputs) -> list[tuple[Place, int]]:
        """Each place of that worker with news, and how many tokens were new to it.

        Raises ValueError where tokens before them are missing: messages of the worker were lost, and it must be
        ended; what it computed goes on from the logs.
        """
        now = self._clock()
        self._metrics.step(outputs.engine, outputs.stats)
        gaps: Counter[float] = Counter()
        news = []
        for index, item in enumerate(outputs.items):
            place = self._places.at(carrier, item)
            if place is not None:
                news.append((place, self._deliver(place, outputs, index, now, gaps)))
        self._metrics.tokens_delivered(outputs.engine, sum([fresh for _, fresh in news]), gaps)
        return news

    def _deliver(self, place: Place, outputs: StepOutputs, index: int, now: float, gaps: Counter[float]) -> int:
        """The time since the choice's last tokens goes to ``gaps``, once for each new one."""
        reply = place.reply
        item = place.item
        first = reply.first_token_at is None
        if outputs.cached_tokens[index] > reply.cached_tokens:
            reply.cached_tokens = outputs.cached_tokens[index]
        reply.queue_seconds = reply.queue_seconds or outputs.queue_seconds[index]
        if outputs.errors and item in outputs.errors:
            reply.fail(InvalidRequest(f"The model failed on this input: {outputs.errors[item]}.", reason="invalid"))
        fresh = len(
            reply.deliver(
                place.choice,
                outputs.first_index[index],
                outputs.tokens[index],
                outputs.ends[index],
                now=now,
                logprobs=outputs.logprobs.get(item, ()) if outputs.logprobs else (),
                prompt_logprobs=outputs.prompt_logprobs.get(item, ()) if outputs.prompt_logprobs else (),
                output=outputs.outputs.get(item, b"") if outputs.outputs else b"",
            )
        )
        if not fresh:
            if reply.request.rows and outputs.ends[index]:
                reply.took_part(outputs.stats.rows)
                self._metrics.answered(reply, outputs.stats.seconds, now)
            return 0
        reply.took_part(outputs.stats.rows)
        if first:
            self._door.started(reply.request)
            self._metrics.first_token(reply.request.model, now - reply.request.arrived)
        if place.last_token_at is not None:
            gaps[(now - place.last_token_at) / fresh] += fresh
        place.last_token_at = now
        return fresh


def ending_of(reply: Reply) -> End:
    """The one ending of a request, whatever its choices have."""
    if reply.error is not None:
        return "error"
    return next(end for end in ("error", "cancelled", "length", "stop") if end in reply.ends)
