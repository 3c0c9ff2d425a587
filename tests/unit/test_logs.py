"""The log for machines: one object a line, and what each line carries."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from engines.protocol import Capacity, EngineInfo, LoadProgress
from server.logs import REQUEST_ID, JsonLines
from server.observer import Observer
from server.request_record import RequestRecord
from server.serve_log import ServeLog


class Lines(logging.Handler):
    """What a handler with JSON lines would write."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines("api"))
        self.written: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.written.append(self.format(record))

    @property
    def objects(self) -> list[dict[str, Any]]:
        assert not any("\n" in line for line in self.written)
        return [json.loads(line) for line in self.written]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Lines:
    handler = Lines()
    for name in ("server.a", "server.observer", "server.serve_log"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "handlers", [handler])
        monkeypatch.setattr(logger, "level", logging.INFO)
        monkeypatch.setattr(logger, "propagate", False)
        logger.manager._clear_cache()  # type: ignore[attr-defined]  # of levels
    return handler


def test_a_line_is_one_object_with_its_time_in_utc(lines: Lines) -> None:
    logging.getLogger("server.a").warning("two\nlines of %s", "\ud800", extra={"fields": {"path": object}})
    (line,) = lines.objects
    assert line["time"].endswith("+00:00")
    assert (line["level"], line["event"], line["logger"], line["process"]) == ("warning", "log", "server.a", "api")
    assert line["message"] == "two\nlines of ?"
    assert "request_id" not in line


def test_a_line_carries_the_request_that_it_was_written_for_and_the_exception(lines: Lines) -> None:
    token = REQUEST_ID.set("abc")
    try:
        raise ValueError("because")
    except ValueError:
        logging.getLogger("server.a").exception("it broke")
    finally:
        REQUEST_ID.reset(token)
    (line,) = lines.objects
    assert line["request_id"] == "abc"
    assert line["exception"].endswith("ValueError: because")


def request(path: str, status: int | None) -> RequestRecord:
    return RequestRecord("id-1", "GET", path, 1.0, status=status)


def test_each_request_is_a_line_but_what_machines_ask_for_all_the_time(lines: Lines) -> None:
    observer = Observer(lambda: 1.25, logging.INFO, None)
    assert observer.useful
    for path, status in (("/v1/models", 200), ("/health/live", 200), ("/health/ready", 503), ("/metrics", 500)):
        observer.end(request(path, status))
    observer.end(request("/v1/completions", None))
    assert [(line["path"], line["status"]) for line in lines.objects] == [
        ("/v1/models", 200),
        ("/metrics", 500),
        ("/v1/completions", None),
    ]
    first = lines.objects[0]
    assert (first["event"], first["request_id"], first["method"], first["seconds"]) == ("request", "id-1", "GET", 0.25)


def test_a_long_or_strange_path_is_cut_and_stays_on_its_line(lines: Lines) -> None:
    observer = Observer(lambda: 1.25, logging.INFO, None)
    made = observer.begin("id", "GET", b"/%0aforged\xff" + b"a" * 1000, {"traceparent": None, "tracestate": b"x" * 600})
    assert made.parent == {}
    observer.end(made)
    (line,) = lines.objects
    assert line["path"].startswith("/%0aforged")
    assert len(line["path"]) == 200


def test_nobody_observes_where_nobody_reads(lines: Lines) -> None:
    assert not Observer(lambda: 1.0, logging.DEBUG, None).useful


def test_a_start_is_told_by_events(lines: Lines) -> None:
    shown = ServeLog()
    for done in (0, 50, 100):
        shown.pulling("m", "downloading", done, 100)
    shown.pulled("m")
    for done in (0, 9):
        shown.changed("m", "loading", LoadProgress(phase="read", done=done, total=9))
    info = EngineInfo(
        name="m", fingerprint="f", device="cpu", dtype="float32", kv_dtype="float32", weight_bytes=1, kv_bytes=2,
        threads=1, load_seconds=1.5, vocab_size=8,
    )  # fmt: skip
    shown.loaded("m", info, Capacity(blocks=10, block_size=16, max_rows=4, max_step_tokens=64, max_model_len=99))
    shown.ready("http://here", ["m"], key=False)
    shown.draining(2, 30.0)
    found = lines.objects
    assert [line["event"] for line in found] == ["phase", "phase", "loaded", "ready", "draining"]
    assert [line["phase"] for line in found[:2]] == ["downloading", "read"]
    assert (found[2]["kv_tokens"], found[2]["dtype"]) == (160, "float32")
    assert found[3]["url"] == "http://here"
