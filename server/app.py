"""Builds every object of a running server; start-up and shutdown in one fixed order.

Start: bind the port, serve HTTP (readiness says 503 until all models are loaded), fetch the models that are not here,
read tokenizers, let workers load. Stop: readiness says 503, open requests finish within the grace time, HTTP closes,
workers stop.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import msgspec

from engines.protocol import Capacity, EngineInfo
from server.admission import Door
from server.api.replies import ReloadOutcome
from server.api.routes import create_api, create_metrics_api
from server.api.state import ApiSettings, ApiState, Model, ModelState, PlainModel, ReadyState
from server.devices import worker_settings
from server.display import ServeDisplay
from server.errors import Conflict, EngineUnavailable, SlimserveError
from server.fetching import Fetching
from server.gpu_metrics import GpuMetrics
from server.http_server import HttpServer, bind
from server.metrics import Metrics
from server.observer import Observer
from server.reload import Reloader, admission_limits, devices
from server.settings import Settings, is_loopback
from server.tenants import TenantTable
from server.tracing import Tracer
from server.version import version
from server.worker.engine_status import EngineStatus
from server.worker.process import FirstWorker
from server.worker.supervisor import Supervisor

log = logging.getLogger(__name__)

STOPPED_BY_SECOND_SIGNAL = 130
TOKENIZER_THREADS = 4


class Application:
    """One running server."""

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        metrics_listener: socket.socket | None,
        display: ServeDisplay,
        reread: Callable[[], Settings],
        first: FirstWorker,
    ):
        """``reread`` gives the settings of a reload; ``first`` runs already."""
        self._settings = settings
        self._listener = listener
        self._display = display
        self._draining = False
        self._was_ready = False
        self._signals = 0
        self._stop = asyncio.Event()
        self._fetching: Fetching | None = Fetching(settings.models, display)
        names = [entry.served_name for entry in settings.models]
        tenants = settings.tenant_table()
        self._metrics = Metrics(names, version=version(), tenants=tenants.names)
        self._metrics.grace(settings.grace)
        self._gpus = GpuMetrics(self._metrics.families)
        door = Door(admission_limits(settings), clock=time.monotonic)
        self._supervisor = Supervisor(
            worker_settings(settings),
            metrics=self._metrics,
            clock=time.monotonic,
            door=door,
            on_change=self._engine_changed,
            on_revert=lambda name: self._reloader.revert(name),
            first=first,
        )
        self._tracer = _tracer(settings)
        self._state = self._api_state(settings, names, tenants)
        self._reloader = Reloader(settings, reread, self._state, self._supervisor, door, display)
        certificate = settings.certificate()
        self._https = certificate is not None
        self._servers = [(HttpServer(create_api(self._state), certificate), listener)]
        if metrics_listener is not None:
            self._servers.append((HttpServer(create_metrics_api(self._state), certificate), metrics_listener))

    def _api_state(self, settings: Settings, coming: Sequence[str], tenants: TenantTable) -> ApiState:
        return ApiState(
            models={},
            coming=coming,
            dispatcher=self._supervisor,
            metrics=self._metrics,
            settings=api_settings(settings),
            tenants=tenants,
            targets=settings.targets(),
            reload=self._reload,
            ready=self._ready,
            observer=_observer(settings, self._tracer),
            clock=time.monotonic,
            wall_clock=time.time,
            executor=ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer"),
            version=version(),
        )

    # --- life

    async def run(self) -> int:
        """Serve until a signal comes or nothing is left to serve; the exit status.

        Raises CommandFailed, UsageError and EngineLoadError for models that cannot be had or served on this machine.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        http = asyncio.create_task(self._serve_http())
        models = asyncio.create_task(self._serve_models())
        stop = asyncio.create_task(self._stop.wait())
        gpus = asyncio.create_task(self._gpus.run())
        try:
            await asyncio.wait({http, models, stop}, return_when=asyncio.FIRST_COMPLETED)
            status = 0 if stop.done() else 1
            if models.done():
                self._display.close()
                if self._fetching is not None:
                    await models  # raises
                log.error("no model is left to serve", exc_info=models.exception())
            await self._drain()
        finally:
            for server, _ in self._servers:
                server.should_exit = True
            await http
            models.cancel()
            stop.cancel()
            gpus.cancel()
            self._gpus.close()
            await self._supervisor.stop()
            self._reloader.close()
            if self._tracer is not None:
                await asyncio.to_thread(self._tracer.close)
        return status

    async def _serve_http(self) -> None:
        """On each port, until all were told to exit."""
        await asyncio.gather(*(server.serve(sockets=[listener]) for server, listener in self._servers))

    async def _serve_models(self) -> None:
        """Until no worker is left that could ever serve again."""
        assert self._fetching is not None
        found = await self._fetching.run()
        wanted = devices(self._settings, found.located)
        self._fetching, self._state.coming = None, ()
        self._state.models = found.read
        self._reloader.begin(found.located)
        gc.collect()
        gc.freeze()
        self._supervisor.begin(wanted)
        await self._supervisor.wait_beyond_repair()

    def _on_signal(self) -> None:
        self._signals += 1
        if self._signals > 1:
            self._supervisor.kill()
            os._exit(STOPPED_BY_SECOND_SIGNAL)
        self._begin_drain()
        self._display.draining(self._supervisor.open_replies, self._reloader.settings.grace)
        self._stop.set()

    def _begin_drain(self) -> None:
        if not self._draining:
            self._draining = True
            self._metrics.drain_began(time.time())
        self._supervisor.drain()

    async def _drain(self) -> None:
        self._begin_drain()
        try:
            await asyncio.wait_for(self._supervisor.wait_empty(), self._reloader.settings.grace)
        except TimeoutError:
            log.warning("the grace time is over: %d requests are ended", self._supervisor.open_replies)
            self._supervisor.fail_open(EngineUnavailable("The server shut down before the answer was complete."))

    # --- reload

    async def _reload(self) -> ReloadOutcome:
        if self._draining:
            raise EngineUnavailable("The server is shutting down.")
        if self._fetching is not None:
            raise Conflict("The server starts: its models are not here yet.", retry_after=5)
        outcome = await self._reloader.reload()
        for server, _ in self._servers:
            server.renew_certificate()
        return outcome

    def _on_hangup(self) -> None:
        self._hangup = asyncio.ensure_future(self._reload_and_tell())

    async def _reload_and_tell(self) -> None:
        try:
            log.warning("reloaded: %s", msgspec.json.encode(await self._reload()).decode())
        except SlimserveError as error:
            log.error("nothing was reloaded: %s", error.log)

    # --- state of the models

    def _engine_changed(self, status: EngineStatus) -> None:
        name = status.spec.name
        models = self._state.models
        if name not in models:
            return
        if status.phase == "ready" and status.capacity is not None and status.info is not None:
            self._state.models = {**models, name: loaded_model(models[name], status.info, status.capacity)}
            self._gpus.watch(status.info)
            self._display.loaded(name, status.info, status.capacity)
        else:
            self._display.changed(name, status.phase, status.progress)
        ready = self._ready().ready
        if ready and not self._was_ready:
            plain = [name for name, model in self._state.models.items() if isinstance(model, PlainModel)]
            language = [name for name in self._state.models if name not in plain]
            self._display.ready(self._url(), language, plain, key=not self._state.tenants.open)
        self._was_ready = ready

    def _ready(self) -> ReadyState:
        coming = () if self._fetching is None else self._fetching.states
        states = (*coming, *(self._model_state(name) for name in self._state.models))
        usable = [state for state in states if state.state != "failed"]
        ready = bool(usable) and all(state.state == "ready" for state in usable)
        return ReadyState(live=self._supervisor.progresses, ready=ready and not self._draining, models=states)

    def _model_state(self, name: str) -> ModelState:
        status = self._supervisor.status(name)
        progress = status.progress
        return ModelState(
            name=name,
            state="draining" if self._draining else status.phase,
            phase="" if progress is None else progress.phase,
            done=0 if progress is None else progress.done,
            total=0 if progress is None else progress.total,
            reason=status.reason,
            device="" if status.info is None else status.info.device,
            dtype="" if status.info is None else status.info.dtype,
        )

    def _url(self) -> str:
        return _url(self._listener, https=self._https)


def loaded_model(model: Model, info: EngineInfo, capacity: Capacity) -> Model:
    """The model with what its engine said of it."""
    if isinstance(model, PlainModel):
        return replace(model, signature=info.signature)
    return replace(model, max_model_len=capacity.max_model_len)


def api_settings(settings: Settings) -> ApiSettings:
    """What the settings say of the HTTP side."""
    return ApiSettings(
        openapi=settings.openapi,
        metrics=settings.metrics_port is None,
        cors_origins=tuple(settings.cors_origins),
        this_machine_only=is_loopback(settings.host) and not settings.allow_remote_without_key,
    )


def _url(listener: socket.socket, *, https: bool) -> str:
    host, port = listener.getsockname()[:2]
    return f"http{'s' if https else ''}://" + (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def _tracer(settings: Settings) -> Tracer | None:
    if settings.otlp_endpoint is None:
        return None
    return Tracer.open(settings.otlp_endpoint, version(), clock=time.monotonic, wall_clock=time.time)


def _observer(settings: Settings, tracer: Tracer | None) -> Observer | None:
    """Lines for machines are wanted for each request; people at a terminal get them with the level debug."""
    observer = Observer(time.monotonic, logging.INFO if settings.log_format == "json" else logging.DEBUG, tracer)
    return observer if observer.useful else None


def serve(settings: Settings, display: ServeDisplay, reread: Callable[[], Settings], first: FirstWorker) -> int:
    """Run a server until it is stopped; the exit status. ``reread`` gives the settings of a reload; ``first`` is the
    first worker's process.

    Raises CommandFailed, UsageError and EngineLoadError.
    """
    with ExitStack() as sockets:
        listener = sockets.enter_context(bind(settings.host, settings.port))
        metrics = None
        if settings.metrics_port is not None:
            metrics = sockets.enter_context(bind(settings.metrics_host, settings.metrics_port))
            log.info("metrics are on %s/metrics", _url(metrics, https=settings.tls_cert is not None))

        async def run() -> int:
            return await Application(settings, listener, metrics, display, reread, first).run()

        return asyncio.run(run())
