"""What the routes need of the rest of the server. ``server/app.py`` builds one ``ApiState`` and hands it over."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Literal

from engines.engine_folder import Quality
from engines.manifest import Manifest
from engines.tensors import Signature
from server.api.replies import ReloadOutcome
from server.metrics import Metrics
from server.observer import Observer
from server.quotas import Quotas
from server.requests import Dispatcher, Targets
from server.tenants import TenantTable
from server.text import ModelText
from server.text.encoder import TextEncoder

EngineState = Literal["starting", "loading", "ready", "restarting", "failed", "draining"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """Where one model stands, for ``/health/ready``."""

    name: str
    state: EngineState
    phase: str = ""
    """What a load does now: read, allocate, measure."""
    done: int = 0
    """Bytes, or 0 where the phase has no measure; as is ``total``."""
    total: int = 0
    reason: str = ""
    """Why it failed or restarts, in words fit for a client."""
    device: str = ""
    """That it was loaded on; empty before the first load, like ``dtype``."""
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class ReadyState:
    live: bool
    """Workers make progress, or are being replaced; what answers at all is alive."""
    ready: bool
    """A request would be served now."""
    models: tuple[ModelState, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """Limits and switches of the HTTP side. Sizes in bytes, times in seconds."""

    max_body: int = 8 << 20
    body_timeout: float = 30.0
    """For a whole request body to arrive."""
    max_connections: int = 2048
    """Most requests inside the server at once, health checks apart; one beyond gets 503."""
    keep_alive: float = 15.0
    """Silence on a stream after which a comment is sent."""
    max_pending_tokens: int = 4096
    """Most tokens of each choice buffered for a client that does not read its stream; beyond, it is cancelled."""
    openapi: bool = True
    """Describe the API at /openapi.json."""
    metrics: bool = True
    """Serve /metrics here; else it has a port of its own."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may use the API: ``https://name[:port]``."""
    this_machine_only: bool = False
    """While no key is needed, answer only requests that name this machine by an address or a name without a dot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    name: str
    created: int
    """Unix time in seconds."""
    manifest: Manifest
    text: ModelText
    max_model_len: int
    """Longest sequence in tokens, prompt and output together."""
    quality: Quality | None = None
    """Of its evaluation card, if it has one."""

    def close(self) -> None:
        """Stops what renders its template."""
        self.text.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainModel:
    """Tensors in, tensors out."""

    name: str
    created: int
    """Unix time in seconds."""
    version: str = "1"
    signature: Signature | None = None
    """None until it was loaded."""
    encoder: TextEncoder | None = None
    """Of a folder with a tokenizer: its texts have embeddings."""

    def close(self) -> None:
        """It holds nothing."""


Model = ServedModel | PlainModel


@dataclass(slots=True, kw_only=True)
class ApiState:
    """A reload may replace ``models``, ``tenants`` and ``targets``; ``models`` is empty until all were found."""

    models: Mapping[str, Model]
    dispatcher: Dispatcher
    metrics: Metrics
    settings: ApiSettings
    ready: Callable[[], ReadyState]
    clock: Callable[[], float]
    """Monotonic seconds."""
    wall_clock: Callable[[], float]
    """Unix seconds, for ``created``."""
    executor: Executor
    """Tokenizing and templates run here, off the event loop; its worker count bounds them."""
    version: str
    reload: Callable[[], Awaitable[ReloadOutcome]] | None = None
    """Reads the settings again and follows them. Raises InvalidRequest, Conflict or EngineUnavailable."""
    tenants: TenantTable = field(default_factory=TenantTable)
    targets: Mapping[str, Targets] = field(default_factory=dict)
    """By priority class."""
    coming: Collection[str] = ()
    """Names of models that are being fetched and read: until then requests for them get 503."""
    observer: Observer | None = None
    """Looks at each request when it is over; None where nobody wants to know."""
    quotas: Quotas = field(init=False)
    _request_ids: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.quotas = Quotas(self.clock)

    @property
    def language_models(self) -> dict[str, ServedModel]:
        """Those that generate text."""
        return {name: model for name, model in self.models.items() if isinstance(model, ServedModel)}

    def next_request_id(self) -> int:
        return next(self._request_ids)
