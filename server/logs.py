"""Logging of all processes: lines for people, or one JSON object a line."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

import msgspec

LogFormat = Literal["text", "json"]
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Of the HTTP request that the running code works for; JSON lines carry it."""

_QUIET = ("uvicorn", "httpx", "huggingface_hub", "asyncio", "opentelemetry", "urllib3")
"""Libraries that speak from warnings up only, unless the level is debug."""


class JsonLines(logging.Formatter):
    """One object a line: ``time`` (UTC), ``level``, ``event``, ``message``, ``logger``, ``process``, ``pid``, and where
    they are known ``request_id``, ``exception`` and what the event has besides.

    A log call names its event and the rest by ``extra={"event": "ready", "fields": {"url": ...}}``.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "log"),
            "message": _sane(record.getMessage()),
            "logger": record.name,
            "process": self._process,
            "pid": record.process,
        }
        if request_id := REQUEST_ID.get():
            fields["request_id"] = request_id
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["exception"] = _sane(self.formatException(record.exc_info))
        return msgspec.json.encode(fields, enc_hook=str).decode()


def _sane(text: str) -> str:
    """Half of a surrogate pair cannot be encoded."""
    return text.encode(errors="replace").decode()


def configure_logging(level: str, format: LogFormat = "text", *, process: str = "api") -> None:
    """To stderr. ``process`` is what JSON lines call this one."""
    handler = logging.StreamHandler()
    if format == "json":
        handler.setFormatter(JsonLines(process))
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
    else:
        who = "" if process == "api" else f"{process}[%(process)d] "
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {who}%(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if level != "debug":
        for library in _QUIET:
            logging.getLogger(library).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


def log_failure(message: str) -> bool:
    """Say why this process ends, where its log is for machines; False where it is for people."""
    if not any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers):
        return False
    logging.getLogger(__name__).critical(message, extra={"event": "failed"})
    return True


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger(__name__).critical("the process dies", exc_info=(kind, error, trace))
