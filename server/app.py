"""Builds every object of a running server; start-up and shutdown in one fixed order.

Start: bind the port, find the models, read tokenizers, start workers, serve HTTP (readiness says 503 until a model is
loaded). Stop: readiness says 503, open requests finish within the grace time, HTTP closes, workers stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn

from engines.fake import FAKE_VOCAB
from engines.manifest import Manifest, read_manifest
from server.admission import AdmissionLimits, Door
from server.api.routes import create_api
from server.api.state import ApiSettings, ApiState, ModelState, ReadyState, ServedModel
from server.catalog import resolve
from server.devices import assign, visible_gpus
from server.display import ServeDisplay
from server.errors import CommandFailed, EngineUnavailable
from server.metrics import Metrics
from server.settings import ModelSettings, Settings
from server.text import load_text
from server.version import version
from server.worker.lifecycle import EngineStatus, WorkerSettings
from server.worker.supervisor import Supervisor

log = logging.getLogger(__name__)

STOPPED_BY_SECOND_SIGNAL = 130
CLOSE_TIMEOUT = 5
"""Seconds for answered connections to take their last bytes."""
TOKENIZER_THREADS = 4
FAKE_CONTEXT = 2048
"""Tokens, until the fake engine says what it has."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises CommandFailed when the address cannot be had."""
    try:
        candidates = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(candidates, key=lambda entry: entry[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            # Listening at once: of two servers that start together the second fails here, before any model work.
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        hint = "; another program uses it, choose another --port" if error.errno == errno.EADDRINUSE else ""
        raise CommandFailed(f"cannot listen on {host} port {port}: {error.strerror}{hint}") from None
    return listener


class HttpServer(uvicorn.Server):
    """Leaves the signals to ``Application``: uvicorn would close the port before readiness could say anything."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True, slots=True)
class LocatedModel:
    """One entry of the configuration and where its files are."""

    settings: ModelSettings
    path: Path


class Application:
    """One running server."""

    def __init__(self, settings: Settings, models: list[LocatedModel], listener: socket.socket, display: ServeDisplay):
        """Raises EngineLoadError and UsageError for models that cannot be served on this machine."""
        self._settings = settings
        self._listener = listener
        self._display = display
        self._draining = False
        self._was_ready = False
        self._signals = 0
        self._stop = asyncio.Event()
        self._models = {model.settings.served_name: self._read(model) for model in models}
        self._metrics = Metrics(self._models, version=version())
        plans = assign(
            [(model.settings, str(model.path)) for model in models], gpus=visible_gpus(), max_batch=settings.max_batch
        )
        self._supervisor = Supervisor(
            [plan.specs for plan in plans],
            _worker_settings(settings),
            metrics=self._metrics,
            clock=time.monotonic,
            door=Door(AdmissionLimits(max_queue=settings.max_queue)),
            on_change=self._engine_changed,
        )
        self._http = HttpServer(self._http_config())

    def _read(self, model: LocatedModel) -> ServedModel:
        manifest = _manifest(model)
        return ServedModel(
            name=model.settings.served_name,
            created=int(time.time()),
            manifest=manifest,
            text=load_text(manifest),
            max_model_len=min(manifest.max_context, model.settings.max_model_len or manifest.max_context),
        )

    def _http_config(self) -> uvicorn.Config:
        key = self._settings.api_key
        state = ApiState(
            models=self._models,
            dispatcher=self._supervisor,
            metrics=self._metrics,
            settings=ApiSettings(api_keys=() if key is None else (key.get_secret_value(),)),
            ready=self._ready,
            clock=time.monotonic,
            wall_clock=time.time,
            executor=ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer"),
            version=version(),
        )
        return uvicorn.Config(
            create_api(state),
            http="h11",
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
        gc.collect()
        gc.freeze()
        self._supervisor.start()
        http = asyncio.create_task(self._http.serve(sockets=[self._listener]))
        broken = asyncio.create_task(self._supervisor.wait_beyond_repair())
        stop = asyncio.create_task(self._stop.wait())
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
            await self._supervisor.stop()
            for model in self._models.values():
                model.text.close()
        return status

    def _on_signal(self) -> None:
        self._signals += 1
        if self._signals > 1:
            self._supervisor.kill()
            os._exit(STOPPED_BY_SECOND_SIGNAL)
        self._draining = True
        self._supervisor.drain()
        self._display.draining(self._supervisor.open_replies, self._settings.grace)
        self._stop.set()

    async def _drain(self) -> None:
        self._draining = True
        self._supervisor.drain()
        try:
            await asyncio.wait_for(self._supervisor.wait_empty(), self._settings.grace)
        except TimeoutError:
            log.warning("the grace time is over: %d requests are ended", self._supervisor.open_replies)
            self._supervisor.fail_open(EngineUnavailable("The server shut down before the answer was complete."))

    # --- state of the models

    def _engine_changed(self, status: EngineStatus) -> None:
        name = status.spec.name
        if status.phase == "ready" and status.capacity is not None and status.info is not None:
            self._models[name] = replace(self._models[name], max_model_len=status.capacity.max_model_len)
            self._display.loaded(name, status.info, status.capacity)
        else:
            self._display.changed(name, status.phase, status.progress)
        ready = self._ready().ready
        if ready and not self._was_ready:
            self._display.ready(self._url(), list(self._models), key=self._settings.api_key is not None)
        self._was_ready = ready

    def _ready(self) -> ReadyState:
        states = tuple(self._model_state(name) for name in self._models)
        usable = [state for state in states if state.state != "failed"]
        ready = bool(usable) and all(state.state == "ready" for state in usable)
        return ReadyState(live=True, ready=ready and not self._draining, models=states)

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
        )

    def _url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _manifest(model: LocatedModel) -> Manifest:
    if model.settings.kind == "generation":
        return read_manifest(model.path, model.settings.random_weights is not None)
    return Manifest(
        source=Path(os.devnull),
        format="safetensors",
        architecture="llama",
        config={},
        dtype="float32",
        max_context=model.settings.max_model_len or FAKE_CONTEXT,
        vocab_size=FAKE_VOCAB,
        bos_token_id=None,
        eos_token_ids=(),
        sampling_defaults={},
        files=(),
        fingerprint="fake",
    )


def _worker_settings(settings: Settings) -> WorkerSettings:
    return WorkerSettings(
        scheduler=settings.scheduler_config(),
        log_level=settings.log_level,
        step_timeout=settings.step_timeout,
        load_timeout=settings.load_timeout,
        max_restarts=settings.max_restarts,
    )


def serve(settings: Settings, display: ServeDisplay) -> int:
    """Run a server until it is stopped; the exit status. Raises CommandFailed, UsageError and EngineLoadError."""
    with bind(settings.host, settings.port) as listener:
        models = [_locate(entry, display) for entry in settings.models]
        return asyncio.run(_run(settings, models, listener, display))


async def _run(settings: Settings, models: list[LocatedModel], listener: socket.socket, display: ServeDisplay) -> int:
    return await Application(settings, models, listener, display).run()


def _locate(entry: ModelSettings, display: ServeDisplay) -> LocatedModel:
    if entry.kind == "fake":
        return LocatedModel(entry, Path(os.devnull))
    name = entry.source
    path = resolve(name, lambda what, done, total: display.pulling(name, what, done, total))
    display.pulled(name)
    return LocatedModel(entry, path)
