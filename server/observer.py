"""Looks at each HTTP request when it is over: one line in the log, and a trace where somebody collects them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from server.request_record import GenerationRecord, RequestRecord

log = logging.getLogger(__name__)

QUIET = frozenset({"/health/live", "/health/ready", "/metrics", "/stats"})
"""Asked every few seconds by machines: no line and no trace, unless it is a fault of ours."""
_LONGEST_PATH = 200
_LONGEST_STATE = 512
"""Characters of ``tracestate`` that are taken over."""


class TraceWriter(Protocol):
    """What makes a trace of a record."""

    def record(self, record: RequestRecord) -> str:
        """Hand over the spans; the trace's id."""


class Observer:
    """``begin`` and ``end`` each request. Between them others note in the record what they know."""

    def __init__(self, clock: Callable[[], float], level: int, traces: TraceWriter | None) -> None:
        """``level`` is that of the lines."""
        self._clock = clock
        self._level = level
        self._traces = traces

    @property
    def useful(self) -> bool:
        """Somebody reads what comes of it."""
        return self._traces is not None or log.isEnabledFor(self._level)

    def begin(self, request_id: str, method: str, raw_path: bytes, parent: dict[str, bytes | None]) -> RequestRecord:
        """``parent`` has the trace headers, None for those that were not sent."""
        path = raw_path[:_LONGEST_PATH].decode("ascii", "replace")
        known = {name: value.decode("latin-1") for name, value in parent.items() if value is not None}
        if len(known.get("tracestate", "")) > _LONGEST_STATE:
            del known["tracestate"]
        return RequestRecord(request_id, method, path, self._clock(), known)

    def answered(self, record: RequestRecord, status: int) -> None:
        """The status line leaves."""
        record.status, record.answered_at = status, self._clock()

    def end(self, record: RequestRecord) -> None:
        """Nothing more is written to the client."""
        record.ended = self._clock()
        if record.path in QUIET and record.status != 500:
            return
        trace = "" if self._traces is None else self._traces.record(record)
        if log.isEnabledFor(self._level):
            self._write(record, trace)

    def _write(self, record: RequestRecord, trace: str) -> None:
        seconds = record.ended - record.began
        fields: dict[str, Any] = {
            "request_id": record.id,
            "method": record.method,
            "path": record.path,
            "status": record.status,
            "seconds": round(seconds, 6),
        }
        if trace:
            fields["trace_id"] = trace
        if record.generation is not None:
            fields |= _of_generation(record.generation)
        log.log(
            self._level,
            "request %s: %s %s %s in %.3f s",
            record.id,
            record.method,
            record.path,
            record.status or "the client left",
            seconds,
            extra={"event": "request", "fields": fields},
        )


def _of_generation(generation: GenerationRecord) -> dict[str, Any]:
    """No text and no token: counts and times."""
    first = generation.first_token_at
    fields: dict[str, Any] = {
        "model": generation.model,
        "prompt_tokens": generation.prompt_tokens,
        "output_tokens": generation.output_tokens,
        "stream": generation.streamed,
        "parse_seconds": round(generation.submitted - generation.arrived, 6),
    }
    if first is not None:
        fields["queue_seconds"] = round(generation.queue_seconds, 6)
        fields["ttft_seconds"] = round(first - generation.arrived, 6)
    if first is not None and generation.ended is not None:
        fields["decode_seconds"] = round(generation.ended - first, 6)
    if generation.finish_reasons:
        fields["finish_reasons"] = generation.finish_reasons
    if reason := generation.refusal or generation.error:
        fields["reason"] = reason
    return fields
