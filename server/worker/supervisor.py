"""The API side of all workers: takes requests, brings tokens back to their replies, and outlives the workers.

A request ends with an error of ours only when no worker can serve its model any more, or when it killed one alone.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Sequence

from engines.protocol import EngineSpec
from server.admission import Door
from server.errors import EngineUnavailable, InternalError, ModelNotFound, SlimserveError
from server.metrics import Metrics
from server.requests import Reply, Request
from server.worker.delivery import Delivery, ending_of
from server.worker.engine_status import EngineStatus, WorkerSettings
from server.worker.lifecycle import KILL_PATIENCE, Worker
from server.worker.places import Place, Places
from server.worker.process import FirstWorker, RuntimeFolder
from server.worker.rollout import Devices, Rollout
from server.worker.router import Router
from server.worker.watch import Cause
from server.worker.wire import LoadReport, Refused, StepOutputs

log = logging.getLogger(__name__)

_ORDER = ("ready", "loading", "starting", "restarting", "failed")
"""Of a model's replicas the one that is furthest speaks for the model."""


class Supervisor:
    """Implements ``Dispatcher`` over worker processes. All methods run on the asyncio loop."""

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        metrics: Metrics,
        clock: Callable[[], float],
        door: Door,
        on_change: Callable[[EngineStatus], None],
        on_revert: Callable[[str], None],
        first: FirstWorker | None = None,
    ) -> None:
        """The process of the first worker that ``begin`` makes may run already: ``first``.

        ``on_change`` is told each change of an engine's status, and ``on_revert`` the name of a model that a reload
        could not change: it is served as before.
        """
        self._metrics = metrics
        self._clock = clock
        self._door = door
        self._on_change = on_change
        self._on_revert = on_revert
        self._settings = settings
        self._folder = RuntimeFolder() if first is None else first.folder
        self._numbers = itertools.count()
        self._workers: dict[str, Worker] = {}
        self._tasks: dict[Worker, asyncio.Task[None]] = {}
        self._stops: set[asyncio.Task[None]] = set()
        self._places = Places()
        self._delivery = Delivery(self._places, metrics, door, clock)
        self._router = Router(self._places, self._serving, clock)
        self._rollout = Rollout(self._workers, self._places, self._router, self._reverted)
        self._first = None if first is None else first.process
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()

    # --- life

    def begin(self, devices: Devices) -> None:
        """Serve the engines of each worker. Called once; ``reload`` changes them later."""
        for device, specs in devices.items():
            self._add(device, specs)
            for spec in specs:
                self._door.shut(spec.name, "starting")
        self._start()

    def _add(self, device: str, specs: Sequence[EngineSpec]) -> None:
        number, started = next(self._numbers), self._first
        self._first = None
        self._workers[device] = Worker(number, specs, self._settings, self, self._folder, self._clock, started)

    def _start(self) -> None:
        """The processes of workers that have none yet."""
        for worker in self._workers.values():
            if worker not in self._tasks:
                self._tasks[worker] = asyncio.create_task(worker.run())

    async def wait_beyond_repair(self) -> None:
        """Return when no worker is left that could ever serve again. Raises what a worker's task raised."""
        while running := [task for task in self._tasks.values() if not task.done()]:
            ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.gather(*ended)

    def drain(self) -> None:
        """Take nothing new; what is open goes on."""
        self._draining = True

    async def wait_empty(self) -> None:
        """Until every reply was closed by its handler."""
        await self._empty.wait()

    def fail_open(self, error: SlimserveError) -> None:
        """End all open replies with this error."""
        for reply in self._places.replies:
            reply.fail(error)

    async def stop(self) -> None:
        """End all processes and remove the sockets. Idempotent. A process that cannot be killed is left behind."""
        self.drain()
        await asyncio.gather(*(worker.stop() for worker in self._tasks))
        lives = asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await asyncio.wait({lives}, timeout=KILL_PATIENCE)
        self._folder.remove()

    def kill(self) -> None:
        """Like ``stop``, without waiting for anything."""
        for worker in self._tasks:
            worker.kill()
        self._folder.remove()

    # --- reload

    @property
    def changing(self) -> bool:
        """A reload goes on, or a model loads: another reload must wait."""
        loading = any(
            status.phase in ("starting", "loading", "restarting")
            for worker in self._workers.values()
            for status in worker.engines.values()
        )
        return loading or self._rollout.going_on

    def reload(self, devices: Devices, settings: WorkerSettings) -> None:
        """Serve these engines under these settings; streams go on, and what must be drained first is. Not while
        ``changing``."""
        self._settings = settings
        for device, specs in devices.items():
            worker = self._workers.get(device)
            if worker is None or self._tasks[worker].done():
                self._add(device, ())
            for spec in specs:
                if not self.replicas(spec.name):
                    self._door.shut(spec.name, "starting")
        for worker in self._workers.values():
            if worker.configure(settings):
                self._router.reoffer(worker, self._places.on(worker))
        self._rollout.begin(devices)
        self._start()
        self._advance()

    def _advance(self) -> None:
        self._rollout.advance()
        for device, worker in list(self._workers.items()):
            if not worker.engines:
                del self._workers[device]
                task = asyncio.create_task(worker.stop())
                self._stops.add(task)
                task.add_done_callback(self._stops.discard)

    def _reverted(self, model: str, reason: str) -> None:
        """Requests that were made for the new form of a model cannot be given to the former one."""
        self._on_revert(model)
        self._fail(self._waiting(model), EngineUnavailable("The model could not be changed.", log=reason))

    # --- state

    def status(self, model: str) -> EngineStatus:
        """Of the model's replica that is furthest; "starting" where a reload has just named it."""
        found = (worker.engines[model] for worker in self._serving(model))
        return min(found, key=lambda each: _ORDER.index(each.phase), default=EngineStatus(EngineSpec(name=model)))

    def replicas(self, model: str) -> int:
        """Workers that serve the model now."""
        return sum(worker.serves(model, self._rollout.version(model)) for worker in self._serving(model))

    @property
    def progresses(self) -> bool:
        """Each worker works, or is being replaced; False where only a new start of everything could help."""
        now = self._clock()
        return not any(worker.stuck(now) for worker in self._workers.values())

    @property
    def open_replies(self) -> int:
        return len(self._places)

    def worker_pids(self) -> list[int]:
        return [worker.pid for worker in self._workers.values() if worker.pid is not None]

    def _serving(self, model: str) -> list[Worker]:
        return [worker for worker in self._workers.values() if model in worker.engines]

    # --- Dispatcher

    def submit(self, request: Request) -> Reply:
        if not self._serving(request.model):
            raise ModelNotFound(f"The model {request.model!r} does not exist.", param="model")
        if self._draining:
            raise EngineUnavailable("The server is shutting down.", retry_after=5)
        try:
            self._door.check(request)
        except SlimserveError:
            self._metrics.turned_away(request)
            raise
        reply = Reply(request, self._closed)
        self._router.file(reply, self._rollout.version(request.model))
        self._door.filed(request)
        self._empty.clear()
        return reply

    def stop_choice(self, reply: Reply, choice: int) -> None:
        reply.end_choice(choice, "stop")
        place = self._places.choice(reply, choice)
        if place is not None:
            self._router.cancel([place])

    def _closed(self, reply: Reply) -> None:
        """The handler is done with it."""
        self._router.cancel(self._places.of(reply))
        self._places.close(reply)
        self._door.ended(reply.request)
        self._metrics.request_ended(reply, ending_of(reply), self._clock())
        if not self._places:
            self._empty.set()
        self._advance()

    def _fail(self, places: Iterable[Place], error: SlimserveError) -> None:
        for place in places:
            self._router.ended(place)
            place.reply.fail(error)

    # --- WorkerOwner

    def outputs(self, worker: Worker, outputs: StepOutputs) -> None:
        for place, fresh in self._delivery.deliver(worker, outputs):
            if place.reply.ends[place.choice]:
                self._router.ended(place)
            elif fresh:
                self._router.delivered(place)

    def refused(self, worker: Worker, refused: Refused) -> None:
        places = [place for item in refused.items if (place := self._places.at(worker, item)) is not None]
        for reply in {place.reply for place in places}:
            error, request = self._door.refusal(refused), reply.request
            self._metrics.refused(request.model, error.reason, request.tenant)
            self._fail([place for place in places if place.reply is reply], error)

    def reported(self, worker: Worker, report: LoadReport) -> None:
        self._metrics.load_report(worker.index, report)
        for load in report.engines:
            self._door.reported(load, worker.index)
        self._router.offer_waiting()

    def lost(self, worker: Worker, launched: Collection[int]) -> None:
        """All that the worker had goes on elsewhere, but for what killed it alone."""
        for engine in worker.engines:
            self._door.lost(engine, worker.index)
        self._metrics.worker_gone(worker.index)
        verdict, stranded = self._router.lost(worker, launched)
        for place in stranded:
            if place.item in verdict.struck:
                self._metrics.struck(place.model)
        guilty = [place for place in stranded if place.item == verdict.guilty]
        for place in guilty:
            request = place.reply.request
            fields = {"request_id": request.http_id, "model": request.model}
            log.error("request %s is ended: workers died of it", request.http_id, extra={"fields": fields})
        self._fail(guilty, InternalError("The model's worker process died of this request; it is not tried again."))
        self._replay([place for place in stranded if place.item != verdict.guilty])

    def _replay(self, places: Collection[Place]) -> None:
        for model in {place.model for place in places}:
            replies = {place.reply for place in places if place.model == model}
            log.warning("%d open requests of %s go on from their logs", len(replies), model)
            self._metrics.replayed(model, len(replies))
        self._router.offer_waiting()

    def restarted(self, worker: Worker, cause: Cause) -> None:
        self._metrics.worker_restarted(worker.index, cause)

    def engine_changed(self, worker: Worker, status: EngineStatus) -> None:
        name = status.spec.name
        if status.phase in ("ready", "failed"):
            self._rollout.settled(worker, status)
        if status.phase == "ready" and status.info is not None and status.capacity is not None:
            self._metrics.engine_loaded(worker.index, status.info, status.capacity)
        ready = self.replicas(name) > 0
        if ready:
            self._door.open(name)
            self._router.offer_waiting()
        elif not any(each.engines[name].comes_back for each in self._serving(name)):
            self._door.shut(name, self._why_not(name))
            self._give_up(name)
        self._metrics.model_ready(name, ready)
        self._on_change(status)
        self._advance()

    def _give_up(self, model: str) -> None:
        """Nothing will compute what waits for this model."""
        error = EngineUnavailable("The model's worker process keeps failing and was given up.", retry_after=30)
        self._fail(self._waiting(model), error)

    def _waiting(self, model: str) -> list[Place]:
        return [place for places in self._places.waiting().values() for place in places if place.model == model]

    def _why_not(self, model: str) -> str:
        status = self.status(model)
        return status.reason or status.phase
