"""Kinds of engines by name; the module behind a kind is imported when the first engine of that kind is created."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from importlib import import_module
from typing import Protocol, cast

from engines.gpu_start import open_gpu
from engines.protocol import Engine, EngineKind, EngineLoadError, EngineSpec, ReportProgress

KINDS: Mapping[EngineKind, str] = {
    "generation": "engines.generation.engine:GenerationEngine",
    "onnx": "engines.onnx.engine:OnnxEngine",
    "fake": "engines.fake:FakeEngine",
}
"""Kind to ``module:Class``; the class has ``load(spec, report) -> Engine``."""
EXTRAS: Mapping[EngineKind, str] = {"onnx": "onnx"}
"""The extra of this package that brings what a kind needs."""


class EngineClass(Protocol):
    def load(self, spec: EngineSpec, report: ReportProgress) -> Engine: ...


def prepare(kind: EngineKind, device: str) -> None:
    """Import what an engine of this kind needs, and open its GPU meanwhile. What cannot be had is told by ``create``.

    The garbage collector rests: it finds nothing in imports, and costs a tenth of their time.
    """
    if kind == "generation" and device.startswith("cuda"):
        open_gpu(device)
    gc.disable()
    try:
        _engine_class(kind)
    except Exception:  # noqa: BLE001 - it fails again where the engine is asked for
        return
    finally:
        gc.freeze()
        gc.enable()


def create(spec: EngineSpec, report: ReportProgress) -> Engine:
    """Load the engine that the spec describes; may take minutes and calls ``report`` meanwhile.

    Raises EngineLoadError for what the user can mend: a model that cannot be served, a library that is not installed.
    """
    try:
        engine_class = _engine_class(spec.kind)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(spec.kind)
        how = "" if extra is None else f"; install it with: pip install 'slimserve[{extra}]'"
        needed = f"an engine of the kind {spec.kind!r} needs the Python package {error.name!r}"
        raise EngineLoadError(needed + how) from error
    return engine_class.load(spec, report)


def _engine_class(kind: EngineKind) -> EngineClass:
    """Raises ImportError."""
    module, _, name = KINDS[kind].partition(":")
    return cast(EngineClass, getattr(import_module(module), name))
