"""Kinds of engines by name; the module behind a kind is imported when the first engine of that kind is created."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Protocol, cast

from engines.protocol import Engine, EngineKind, EngineLoadError, EngineSpec, ReportProgress

KINDS: Mapping[EngineKind, str] = {
    "generation": "engines.generation.engine:GenerationEngine",
    "fake": "engines.fake:FakeEngine",
}
"""Kind to ``module:Class``; the class has ``load(spec, report) -> Engine``."""


class EngineClass(Protocol):
    def load(self, spec: EngineSpec, report: ReportProgress) -> Engine: ...


def create(spec: EngineSpec, report: ReportProgress) -> Engine:
    """Load the engine that the spec describes; may take minutes and calls ``report`` meanwhile.

    Raises EngineLoadError for what the user can mend: a model that cannot be served, a library that is not installed.
    """
    module, _, name = KINDS[spec.kind].partition(":")
    try:
        engine_class = cast(EngineClass, getattr(import_module(module), name))
    except ModuleNotFoundError as error:
        raise EngineLoadError(f"an engine of the kind {spec.kind!r} needs the Python package {error.name!r}") from error
    return engine_class.load(spec, report)
