"""The face of ``slimserve serve`` where machines read its output: an event in the log for all that a terminal shows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from engines.protocol import Capacity, EngineInfo, LoadProgress

log = logging.getLogger(__name__)


class ServeLog:
    """Implements ``ServeDisplay``: one line for each phase of a load or download, none for its progress."""

    def __init__(self) -> None:
        self._phases: dict[str, str] = {}

    def pulling(self, name: str, what: str, done: int, total: int) -> None:
        self._phase(name, what, total)

    def pulled(self, name: str) -> None:
        self._phases.pop(name, None)

    def changed(self, name: str, phase: str, progress: LoadProgress | None) -> None:
        if progress is None:
            self._phase(name, phase, 0)
        else:
            self._phase(name, progress.phase, progress.total)

    def loaded(self, name: str, info: EngineInfo, capacity: Capacity) -> None:
        self._phases.pop(name, None)
        self._say(
            "loaded",
            f"{name} is loaded",
            model=name,
            dtype=info.dtype,
            device=info.device,
            weight_bytes=info.weight_bytes,
            kv_bytes=info.kv_bytes,
            kv_dtype=info.kv_dtype,
            kv_tokens=capacity.blocks * capacity.block_size,
            max_model_len=capacity.max_model_len,
            max_batch=capacity.max_rows,
            seconds=round(info.load_seconds, 3),
        )

    def ready(self, url: str, models: Sequence[str], plain: Sequence[str] = (), *, key: bool) -> None:
        self._say("ready", f"ready: {url}/v1", url=url, models=[*models, *plain], key=key)

    def draining(self, open_replies: int, grace: float) -> None:
        self._say("draining", "the server stops", open_requests=open_replies, grace_seconds=grace)

    def close(self) -> None:
        """There is nothing on a screen to be taken away."""

    def _phase(self, name: str, phase: str, total: int) -> None:
        if self._phases.get(name) != phase:
            self._phases[name] = phase
            self._say("phase", f"{name}: {phase}", model=name, phase=phase, bytes=total)

    def _say(self, event: str, message: str, **fields: Any) -> None:
        log.info(message, extra={"event": event, "fields": fields})
