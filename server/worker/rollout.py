"""Brings the engines of all workers to what a reload wants, without losing a stream.

A model that changes, or goes, first finishes what is open for it; new requests for a changed one wait meanwhile. A
replica that goes hands its streams to the others. What a changed model's new form cannot load is undone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import msgspec

from engines.protocol import EngineSpec
from server.worker.engine_status import EngineStatus
from server.worker.lifecycle import Worker
from server.worker.places import Places
from server.worker.router import Router

log = logging.getLogger(__name__)

Devices = Mapping[str, Sequence[EngineSpec]]
"""The engines of each worker, by the name of its device."""


class Rollout:
    """``begin`` says what is wanted; ``advance``, called whenever something ended, does what can be done by now."""

    def __init__(
        self, workers: Mapping[str, Worker], places: Places, router: Router, reverted: Callable[[str, str], None]
    ) -> None:
        """``reverted`` is told the name of a model whose former form is served again, and why."""
        self._workers = workers
        self._places = places
        self._router = router
        self._reverted = reverted
        self._versions: dict[str, int] = {}
        self._wanted: dict[str, dict[str, EngineSpec]] | None = None
        self._former: dict[tuple[Worker, str], EngineSpec] = {}
        self._advancing = False

    @property
    def going_on(self) -> bool:
        return self._wanted is not None or bool(self._former)

    def version(self, model: str) -> int:
        """Of new requests for the model."""
        return self._versions.get(model, 0)

    def begin(self, devices: Devices) -> None:
        """Nothing may be going on."""
        self._wanted = {device: {spec.name: spec for spec in specs} for device, specs in devices.items()}
        for name in {name for specs in self._wanted.values() for name in specs}:
            before = [worker.engines[name].spec for worker in self._workers.values() if name in worker.engines]
            after = [specs[name] for specs in self._wanted.values() if name in specs]
            if before and {*map(_form, before)} != {*map(_form, after)}:
                self._versions[name] = self.version(name) + 1
        self.advance()

    def advance(self) -> None:
        """Also called while it runs, by what it changes: then it does nothing."""
        if self._wanted is None or self._advancing:
            return
        self._advancing = True
        try:
            followed = [
                self._follow(worker, self._wanted.get(device, {})) for device, worker in list(self._workers.items())
            ]
        finally:
            self._advancing = False
        if all(followed):
            self._wanted = None

    def _follow(self, worker: Worker, wanted: Mapping[str, EngineSpec]) -> bool:
        """True when the worker holds what is wanted."""
        for status in list(worker.engines.values()):
            if wanted.get(status.spec.name) != status.spec:
                self._replace(worker, status, wanted.get(status.spec.name))
        for name in wanted.keys() - worker.engines.keys():
            worker.load(wanted[name], self.version(name))
        return {name: status.spec for name, status in worker.engines.items()} == wanted

    def _replace(self, worker: Worker, status: EngineStatus, spec: EngineSpec | None) -> None:
        name = status.spec.name
        if spec is None and self._served_elsewhere(worker, status):
            status.retired = True
            mine = [place for place in self._places.on(worker) if place.model == name]
            numbers = [place.item for place in mine]
            self._router.reoffer(worker, mine)
            self._router.tell_cancelled(worker, numbers)
        elif self._places.holds(name, status.version):
            return
        worker.unload(name)
        if spec is not None:
            served = status.info is not None
            if served:
                self._former[worker, name] = status.spec
            worker.load(spec, self.version(name), awaited=served)

    def _served_elsewhere(self, worker: Worker, status: EngineStatus) -> bool:
        return any(
            other is not worker and other.serves(status.spec.name, status.version) for other in self._workers.values()
        )

    def settled(self, worker: Worker, status: EngineStatus) -> None:
        """An engine is ready, or has failed for good: then the one before it comes back, where there was one."""
        former = self._former.pop((worker, status.spec.name), None)
        if former is None or status.phase != "failed":
            return
        name = status.spec.name
        log.error("the former %s is served again: %s", name, status.reason)
        for device, each in self._workers.items():
            if each is worker and self._wanted is not None:
                self._wanted[device][name] = former
        worker.load(former, status.version, awaited=True)
        self._reverted(name, status.reason)


def _form(spec: EngineSpec) -> bytes:
    """What makes two engines give the same answers: all but the device that they are on."""
    return msgspec.msgpack.encode(msgspec.structs.replace(spec, device=""))
