"""The API side of all workers: files requests with the least loaded one and routes tokens back to their replies."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from engines.protocol import End, EngineSpec
from server.admission import Door
from server.errors import EngineUnavailable, InternalError, ModelNotFound, Overloaded, SlimserveError
from server.metrics import Metrics
from server.requests import Reply, Request
from server.worker.lifecycle import EngineStatus, Worker, WorkerSettings
from server.worker.process import RuntimeFolder
from server.worker.wire import Cancel, Item, LoadReport, Offer, Refused, StepOutputs

log = logging.getLogger(__name__)

_ORDER = ("ready", "loading", "starting", "restarting", "failed")
"""Of a model's replicas the one that is furthest speaks for the model."""


@dataclass(slots=True)
class _Place:
    """Where the tokens of one item go."""

    reply: Reply
    choice: int
    last_token_at: float | None = None


@dataclass(slots=True)
class _Route:
    """Where the choices of one reply are computed."""

    worker: Worker
    items: dict[int, int] = field(default_factory=dict)
    """Choice -> item, for choices that have not ended."""


def replay_items(reply: Reply, numbers: Iterable[int], now: float) -> list[Item]:
    """Items that carry on every unended choice from its log: prompt, then the tokens so far.

    For a new reply, whose logs are empty, these are simply its items.
    """
    request = reply.request
    open_choices = [choice for choice, end in enumerate(reply.ends) if not end]
    return [
        Item(
            item=number,
            request=request.id,
            engine=request.model,
            tokens=[*request.prompt, *reply.logs[choice].tokens],
            prompt_length=len(request.prompt),
            max_tokens=request.max_tokens,
            sampling=request.sampling[choice],
            prompt_logprobs=request.prompt_logprobs,
            cache_salt=request.cache_salt,
            waited=max(0.0, now - request.arrived),
        )
        for choice, number in zip(open_choices, numbers, strict=False)
    ]


class Supervisor:
    """Implements ``Dispatcher`` over worker processes. All methods run on the asyncio loop."""

    def __init__(
        self,
        devices: Sequence[Sequence[EngineSpec]],
        settings: WorkerSettings,
        *,
        metrics: Metrics,
        clock: Callable[[], float],
        door: Door,
        on_change: Callable[[EngineStatus], None],
    ) -> None:
        """``devices`` has the engines of each worker. ``on_change`` is told each change of an engine's status."""
        self._metrics = metrics
        self._clock = clock
        self._door = door
        self._on_change = on_change
        self._folder = RuntimeFolder()
        self._workers = [
            Worker(index, specs, settings, self, self._folder, clock) for index, specs in enumerate(devices)
        ]
        self._places: dict[Worker, dict[int, _Place]] = {worker: {} for worker in self._workers}
        self._routes: dict[Reply, _Route] = {}
        for specs in devices:
            for spec in specs:
                door.shut(spec.name, "starting")
        self._numbers = itertools.count(1)
        self._tasks: list[asyncio.Task[None]] = []
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()

    # --- life

    def start(self) -> None:
        self._tasks = [asyncio.create_task(worker.run()) for worker in self._workers]

    async def wait_beyond_repair(self) -> None:
        """Return when no worker is left that could ever serve again. Raises what a worker's task raised."""
        await asyncio.gather(*self._tasks)

    def drain(self) -> None:
        """Take nothing new; what is open goes on."""
        self._draining = True

    async def wait_empty(self) -> None:
        """Until every reply was closed by its handler."""
        await self._empty.wait()

    def fail_open(self, error: SlimserveError) -> None:
        """End all open replies with this error."""
        for reply in list(self._routes):
            reply.fail(error)

    async def stop(self) -> None:
        """End all processes and remove the sockets. Idempotent."""
        self.drain()
        await asyncio.gather(*(worker.stop() for worker in self._workers))
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._folder.remove()

    def kill(self) -> None:
        """Like ``stop``, without waiting for anything."""
        for worker in self._workers:
            worker.kill()
        self._folder.remove()

    # --- state

    def status(self, model: str) -> EngineStatus:
        """Of the model's replica that is furthest."""
        return min((worker.engines[model] for worker in self._serving(model)), key=lambda s: _ORDER.index(s.phase))

    def replicas(self, model: str) -> int:
        """Workers that serve the model now."""
        return sum(worker.serves(model) for worker in self._serving(model))

    @property
    def open_replies(self) -> int:
        return len(self._routes)

    def worker_pids(self) -> list[int]:
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def _serving(self, model: str) -> list[Worker]:
        return [worker for worker in self._workers if model in worker.engines]

    # --- Dispatcher

    def submit(self, request: Request) -> Reply:
        workers = self._serving(request.model)
        if not workers:
            raise ModelNotFound(f"The model {request.model!r} does not exist.", param="model")
        if self._draining:
            raise EngineUnavailable("The server is shutting down.", retry_after=5)
        self._door.check(request)
        ready = [worker for worker in workers if worker.serves(request.model)]
        if not ready:
            raise EngineUnavailable(f"The model {request.model} is not available now.", retry_after=2)
        worker = min(ready, key=lambda one: len(self._places[one]))
        reply = Reply(request, self._closed)
        items = replay_items(reply, self._numbers, self._clock())
        worker.send(Offer(items))
        self._door.filed(request)
        self._routes[reply] = _Route(worker, {item.sampling.choice: item.item for item in items})
        self._places[worker].update({item.item: _Place(reply, item.sampling.choice) for item in items})
        self._empty.clear()
        return reply

    def stop_choice(self, reply: Reply, choice: int) -> None:
        reply.end_choice(choice, "stop")
        self._cancel(reply, [choice])

    def _closed(self, reply: Reply) -> None:
        """The handler is done with it."""
        self._cancel(reply, range(len(reply.ends)))
        self._routes.pop(reply, None)
        self._door.ended(reply.request)
        self._metrics.request_ended(reply, ending_of(reply), self._clock())
        if not self._routes:
            self._empty.set()

    def _cancel(self, reply: Reply, choices: Iterable[int]) -> None:
        route = self._routes.get(reply)
        if route is None:
            return
        items = [route.items[choice] for choice in choices if choice in route.items]
        for item in items:
            self._forget(route.worker, item)
        if items:
            try:
                route.worker.send(Cancel(items))
            except Overloaded as error:
                log.warning("a cancel was not sent: %s", error.log)

    def _forget(self, worker: Worker, item: int) -> _Place | None:
        """The item has ended: nothing more is delivered to it."""
        place = self._places[worker].pop(item, None)
        if place is not None and place.reply in self._routes:
            self._routes[place.reply].items.pop(place.choice, None)
        return place

    # --- WorkerOwner

    def outputs(self, worker: Worker, outputs: StepOutputs) -> None:
        now = self._clock()
        places = self._places[worker]
        self._metrics.step(outputs.engine, outputs.stats)
        self._door.stepped(outputs.engine, outputs.stats)
        gaps: list[float] = []
        count = 0
        for place_in_step, item in enumerate(outputs.items):
            place = places.get(item)
            if place is not None:
                count += self._deliver(place, item, outputs, place_in_step, now, gaps)
                if place.reply.ends[place.choice]:
                    self._forget(worker, item)
        self._metrics.tokens_delivered(outputs.engine, count, gaps)

    def _deliver(
        self, place: _Place, item: int, outputs: StepOutputs, index: int, now: float, gaps: list[float]
    ) -> int:
        """Tokens that were new; the time since the choice's last ones goes to ``gaps``, once for each."""
        reply = place.reply
        first = reply.first_token_at is None
        reply.cached_tokens = max(reply.cached_tokens, outputs.cached_tokens[index])
        reply.queue_seconds = reply.queue_seconds or outputs.queue_seconds[index]
        try:
            fresh = reply.deliver(
                place.choice,
                outputs.first_index[index],
                outputs.tokens[index],
                outputs.ends[index],
                now=now,
                logprobs=outputs.logprobs.get(item, ()),
                prompt_logprobs=outputs.prompt_logprobs.get(item, ()),
            )
        except ValueError as error:
            reply.fail(InternalError("The answer broke off by a fault of the server.", log=str(error)))
            log.exception("tokens of request %d do not fit its log", reply.request.id)
            return 0
        if not fresh:
            return 0
        if first:
            self._door.started(reply.request)
            self._metrics.first_token(reply.request.model, now - reply.request.arrived)
        if place.last_token_at is not None:
            gaps += [(now - place.last_token_at) / len(fresh)] * len(fresh)
        place.last_token_at = now
        return len(fresh)

    def refused(self, worker: Worker, refused: Refused) -> None:
        error = Overloaded("The model cannot take the request now; try again later.", log=refused.reason, retry_after=1)
        for item in refused.items:
            place = self._forget(worker, item)
            if place is not None:
                place.reply.fail(error)

    def reported(self, worker: Worker, report: LoadReport) -> None:
        self._metrics.load_report(worker.index, report)
        for load in report.engines:
            self._door.reported(load)

    def lost(self, worker: Worker) -> None:
        """Each waiting client gets one clear error; the details are in the log."""
        error = EngineUnavailable("The model's worker process stopped while it worked on the request.", retry_after=2)
        for item in list(self._places[worker]):
            place = self._forget(worker, item)
            if place is not None:
                place.reply.fail(error)
        self._metrics.worker_gone(worker.index)

    def restarted(self, worker: Worker) -> None:
        self._metrics.worker_restarted(worker.index)

    def engine_changed(self, worker: Worker, status: EngineStatus) -> None:
        name = status.spec.name
        ready = self.replicas(name) > 0
        if ready:
            self._door.open(name)
        else:
            self._door.shut(name, self._why_not(name))
        self._metrics.model_ready(name, ready)
        self._on_change(status)

    def _why_not(self, model: str) -> str:
        status = self.status(model)
        return status.reason or status.phase


def ending_of(reply: Reply) -> End:
    """The one ending of a request, whatever its choices have."""
    if reply.error is not None:
        return "error"
    return next(end for end in ("error", "cancelled", "length", "stop") if end in reply.ends)
