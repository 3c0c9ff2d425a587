"""Reads the settings again and lets a running server follow them, without losing a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from engines.protocol import EngineLoadError, EngineSpec
from server.admission import AdmissionLimits, Door
from server.api.replies import ReloadOutcome
from server.api.state import ApiState, Model
from server.devices import assign, visible_gpus, worker_settings
from server.display import ServeDisplay
from server.errors import CommandFailed, Conflict, InvalidRequest, SlimserveError, UsageError
from server.served_models import LocatedModel, locate, read_model
from server.settings import ModelSettings, Settings
from server.tenants import TenantTable
from server.worker.supervisor import Supervisor

FIXED = (
    "host",
    "port",
    "metrics_host",
    "metrics_port",
    "tls_cert",
    "tls_key",
    "cors_origins",
    "openapi",
    "allow_remote_without_key",
    "log_level",
    "log_format",
    "otlp_endpoint",
)
"""Settings that a server keeps for its life."""


def compare(old: Settings, served: Mapping[str, ModelSettings], new: Settings) -> ReloadOutcome:
    """``served`` are the models of now. Raises InvalidRequest that names the setting which needs a restart."""
    differing = [
        name for name in Settings.model_fields if name != "models" and getattr(old, name) != getattr(new, name)
    ]
    for name in differing:
        if name in FIXED:
            raise InvalidRequest(f"{name} cannot change while the server runs; restart it. Nothing was changed.")
    after = _by_name(new)
    changed = {
        name
        for name in served.keys() & after.keys()
        if served[name] != after[name] or "max_batch" in differing  # which is a bound of each engine
    }
    return ReloadOutcome(
        added=sorted(after.keys() - served.keys()),
        changed=sorted(changed),
        removed=sorted(served.keys() - after.keys()),
        settings=differing,
    )


def _by_name(settings: Settings) -> dict[str, ModelSettings]:
    return {entry.served_name: entry for entry in settings.models}


class Reloader:
    """What the running server was built from; ``reload`` changes it."""

    def __init__(
        self,
        settings: Settings,
        reread: Callable[[], Settings],
        state: ApiState,
        supervisor: Supervisor,
        door: Door,
        display: ServeDisplay,
    ) -> None:
        """The models of ``state`` are closed with this object."""
        self.settings = settings
        self._located: dict[str, LocatedModel] = {}
        self._reread = reread
        self._state = state
        self._supervisor = supervisor
        self._door = door
        self._display = display
        self._former: dict[str, Model] = {}
        self._former_located = self._located
        self._failed: list[Model] = []
        self._busy = False

    def begin(self, located: dict[str, LocatedModel]) -> None:
        """Where the models of ``state`` are: those that the server started with."""
        self._located = self._former_located = located

    async def reload(self) -> ReloadOutcome:
        """Raises InvalidRequest or Conflict, and then nothing has changed."""
        self._check_free()
        self._busy = True
        try:
            new = await asyncio.to_thread(self._reread)
            served = {name: model.settings for name, model in self._located.items()}
            outcome = compare(self.settings, served, new)
            located, read = await asyncio.to_thread(self._read, new, outcome)
            wanted, tenants = devices(new, located), new.tenant_table()
        except (UsageError, CommandFailed, EngineLoadError) as error:
            raise InvalidRequest(f"{error}. Nothing was changed.") from None
        finally:
            self._busy = False
        try:
            self._check_free()
            self._follow(new, located, read, wanted, tenants)
        except SlimserveError:
            _close(read.values())
            raise
        return outcome

    def _check_free(self) -> None:
        if self._busy or self._supervisor.changing:
            raise Conflict("A reload goes on or a model loads; try again when it is done.", retry_after=5)

    def _read(self, settings: Settings, outcome: ReloadOutcome) -> tuple[dict[str, LocatedModel], dict[str, Model]]:
        """Where all models are, and those that are new here."""
        fresh = {*outcome.added, *outcome.changed}
        entries = _by_name(settings)
        located = {
            name: locate(entry, self._display) if name in fresh else self._located[name]
            for name, entry in entries.items()
        }
        read: dict[str, Model] = {}
        try:
            for name in fresh:
                read[name] = read_model(located[name])
        except EngineLoadError:
            _close(read.values())
            raise
        return located, read

    def _follow(
        self,
        settings: Settings,
        located: dict[str, LocatedModel],
        read: dict[str, Model],
        wanted: dict[str, list[EngineSpec]],
        tenants: TenantTable,
    ) -> None:
        # Whoever used a model of the reload before this one has ended.
        self._close_unused()
        models = self._state.models
        self._former = {name: model for name, model in models.items() if name in read or name not in located}
        self._former_located = self._located
        self._state.models = {name: read.get(name) or models[name] for name in located}
        self._state.tenants, self._state.targets = tenants, settings.targets()
        self._state.metrics.know(located, tenants.names)
        self._state.metrics.grace(settings.grace)
        self._door.limits = admission_limits(settings)
        self.settings, self._located = settings, located
        self._supervisor.reload(wanted, worker_settings(settings))

    def revert(self, name: str) -> None:
        """The model's new form cannot be loaded: its requests are read as before."""
        former = self._former.pop(name, None)
        if former is not None:
            self._failed.append(self._state.models[name])
            self._state.models = {**self._state.models, name: former}
            self._located = {**self._located, name: self._former_located[name]}

    def close(self) -> None:
        """Stops what renders the templates of the models."""
        _close(self._state.models.values())
        self._close_unused()

    def _close_unused(self) -> None:
        _close(self._former.values())
        _close(self._failed)
        self._former, self._failed = {}, []


def _close(models: Iterable[Model]) -> None:
    for model in models:
        model.close()


def admission_limits(settings: Settings) -> AdmissionLimits:
    return AdmissionLimits(max_queue=settings.max_queue, max_wait=settings.max_wait)


def devices(settings: Settings, models: Mapping[str, LocatedModel]) -> dict[str, list[EngineSpec]]:
    """The engines of each device. Raises UsageError when a device is missing."""
    entries = [(model.settings, str(model.path)) for model in models.values()]
    return {plan.name: plan.specs for plan in assign(entries, gpus=visible_gpus(), max_batch=settings.max_batch)}
