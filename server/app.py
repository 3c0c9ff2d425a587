"""Builds every object of a running server; start-up and shutdown in one fixed order.

Start: bind the port, find the models, read tokenizers, start workers, serve HTTP (readiness says 503 until a model is
loaded). Stop: readiness says 503, open requests finish within the grace time, HTTP closes, workers stop.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgspec
import uvicorn

from server.admission import Door
from server.api.replies import ReloadOutcome
from server.api.routes import create_api
from server.api.state import ApiSettings, ApiState, ModelState, ReadyState, ServedModel
from server.devices import worker_settings
from server.display import ServeDisplay
from server.errors import EngineUnavailable, SlimserveError
from server.gpu_metrics import GpuMetrics
from server.http_server import HttpConnection, HttpServer, bind
from server.metrics import Metrics
from server.reload import Reloader, admission_limits, devices
from server.served_models import LocatedModel, locate, read_model
from server.settings import Settings
from server.tenants import TenantTable
from server.version import version
from server.worker.engine_status import EngineStatus
from server.worker.process import FirstWorker
from server.worker.supervisor import Supervisor

log = logging.getLogger(__name__)

STOPPED_BY_SECOND_SIGNAL = 130
CLOSE_TIMEOUT = 5
"""Seconds for answered connections to take their last bytes."""
TOKENIZER_THREADS = 4


class Application:
    """One running server."""

    def __init__(
        self,
        settings: Settings,
        models: list[LocatedModel],
        listener: socket.socket,
        display: ServeDisplay,
        reread: Callable[[], Settings],
        first: FirstWorker,
    ):
        """``reread`` gives the settings of a reload; ``first`` runs already.

        Raises EngineLoadError and UsageError for models that cannot be served on this machine.
        """
        self._listener = listener
        self._display = display
        self._draining = False
        self._was_ready = False
        self._signals = 0
        self._stop = asyncio.Event()
        located = {model.settings.served_name: model for model in models}
        models_read = {name: read_model(model) for name, model in located.items()}
        tenants = settings.tenant_table()
        self._metrics = Metrics(models_read, version=version(), tenants=tenants.names)
        self._metrics.grace(settings.grace)
        self._gpus = GpuMetrics(self._metrics.families)
        door = Door(admission_limits(settings), clock=time.monotonic)
        self._supervisor = Supervisor(
            devices(settings, located),
            worker_settings(settings),
            metrics=self._metrics,
            clock=time.monotonic,
            door=door,
            on_change=self._engine_changed,
            on_revert=lambda name: self._reloader.revert(name),
            first=first,
        )
        self._state = self._api_state(settings, models_read, tenants)
        self._reloader = Reloader(settings, located, reread, self._state, self._supervisor, door, display)
        self._http = HttpServer(self._http_config())

    def _api_state(self, settings: Settings, models: Mapping[str, ServedModel], tenants: TenantTable) -> ApiState:
        return ApiState(
            models=models,
            dispatcher=self._supervisor,
            metrics=self._metrics,
            settings=ApiSettings(),
            tenants=tenants,
            targets=settings.targets(),
            reload=self._reload,
            ready=self._ready,
            clock=time.monotonic,
            wall_clock=time.time,
            executor=ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer"),
            version=version(),
        )

    def _http_config(self) -> uvicorn.Config:
        return uvicorn.Config(
            create_api(self._state),
            http=HttpConnection,
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=65,
            timeout_graceful_shutdown=CLOSE_TIMEOUT,
        )

    # --- life

    async def run(self) -> int:
        """Serve until a signal comes or nothing is left to serve; the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        gc.collect()
        gc.freeze()
        self._supervisor.start()
        http = asyncio.create_task(self._http.serve(sockets=[self._listener]))
        broken = asyncio.create_task(self._supervisor.wait_beyond_repair())
        stop = asyncio.create_task(self._stop.wait())
        gpus = asyncio.create_task(self._gpus.run())
        try:
            await asyncio.wait({http, broken, stop}, return_when=asyncio.FIRST_COMPLETED)
            status = 0 if stop.done() else 1
            if broken.done():
                self._display.close()
                log.error("no model is left to serve", exc_info=broken.exception())
            await self._drain()
            self._http.should_exit = True
            await http
        finally:
            stop.cancel()
            gpus.cancel()
            self._gpus.close()
            await self._supervisor.stop()
            self._reloader.close()
        return status

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
        return await self._reloader.reload()

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
            model = replace(models[name], max_model_len=status.capacity.max_model_len)
            self._state.models = {**models, name: model}
            self._gpus.watch(status.info)
            self._display.loaded(name, status.info, status.capacity)
        else:
            self._display.changed(name, status.phase, status.progress)
        ready = self._ready().ready
        if ready and not self._was_ready:
            self._display.ready(self._url(), list(self._state.models), key=not self._state.tenants.open)
        self._was_ready = ready

    def _ready(self) -> ReadyState:
        states = tuple(self._model_state(name) for name in self._state.models)
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
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(settings: Settings, display: ServeDisplay, reread: Callable[[], Settings], first: FirstWorker) -> int:
    """Run a server until it is stopped; the exit status. ``reread`` gives the settings of a reload; ``first`` is the
    first worker's process.

    Raises CommandFailed, UsageError and EngineLoadError.
    """
    with bind(settings.host, settings.port) as listener:
        models = [locate(entry, display) for entry in settings.models]

        async def run() -> int:
            return await Application(settings, models, listener, display, reread, first).run()

        return asyncio.run(run())
