"""Where an engine of a worker stands, and what a worker is told of times and budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from engines.protocol import Capacity, EngineInfo, EngineSpec, LoadProgress
from server.logs import LogFormat
from server.scheduler.config import SchedulerConfig

EnginePhase = Literal["starting", "loading", "ready", "restarting", "failed"]


@dataclass(slots=True)
class EngineStatus:
    """Where one engine of one worker stands."""

    spec: EngineSpec
    version: int = 0
    """Raised by each reload that changes the model."""
    awaited: bool = False
    """It takes the place of an engine that served, so requests wait for it."""
    retired: bool = False
    """It takes nothing new and is unloaded soon: others serve its model."""
    phase: EnginePhase = "starting"
    progress: LoadProgress | None = None
    reason: str = ""
    """Why it failed or restarts, fit for a client."""
    info: EngineInfo | None = None
    """Of the last load, as is ``capacity``."""
    capacity: Capacity | None = None

    @property
    def comes_back(self) -> bool:
        """Requests may wait for it: it, or the one before it, has served, and it is not given up."""
        return (self.info is not None or self.awaited) and self.phase != "failed"

    @property
    def spec_to_load(self) -> EngineSpec:
        """With what the last load measured, so that the next one need not."""
        measured = None if self.info is None else self.info.measured
        return msgspec.structs.replace(self.spec, measured=measured)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Times in seconds."""

    scheduler: SchedulerConfig
    log_level: str = "info"
    log_format: LogFormat = "text"
    step_timeout: float = 120.0
    load_timeout: float = 1800.0
    max_restarts: int = 8
