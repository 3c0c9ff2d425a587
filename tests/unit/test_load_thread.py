"""The thread that loads a worker's engines: libraries first, then loads, and what the time of a start went into."""

from __future__ import annotations

import gc
import logging
import queue
from itertools import count
from pathlib import Path

import pytest

from benchmarks.startup import worker_phases
from engines import registry
from engines.protocol import EngineLoadError, EngineSpec
from server.worker.loading import LoadThread
from server.worker.wire import Loaded, Loading

FAKE = EngineSpec(name="m-1.5", kind="fake")


def test_the_log_tells_where_the_time_of_a_start_went(caplog: pytest.LogCaptureFixture) -> None:
    """The process began 7 s ago, and each look at the clock takes one second."""
    ticks = count(100)
    woken: queue.SimpleQueue[None] = queue.SimpleQueue()
    with caplog.at_level(logging.INFO, "server.worker.loading"):
        loads = LoadThread(1, wake=lambda: woken.put(None), clock=lambda: float(next(ticks)), begun=93.0)
        loads.prepare("fake", "cpu")
        loads.start(FAKE)
        woken.get(timeout=20)
        woken.get(timeout=20)
    assert [type(message) for message, _ in loads.news()] == [Loading, Loaded]
    assert not loads.busy
    [line] = [record.getMessage() for record in caplog.records]
    assert line == "m-1.5: loaded in 9.00 s: interpreter 7.00, libraries 1.00, order 1.00"
    said = [(1.0, "m-1.5: reading weights (3.1 GB)\n"), (11.5, f"INFO worker[7] server.worker.loading: {line}\n")]
    assert worker_phases(said, "m-1.5") == {"before": 2.5, "interpreter": 7.0, "libraries": 1.0, "order": 1.0}
    assert worker_phases(said, "another") == {}


def test_a_kind_that_cannot_be_imported_fails_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine_without_its_library.py").write_text("import package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "KINDS", {"fake": "engine_without_its_library:Absent"})
    registry.prepare("fake", "cpu")
    assert gc.isenabled()
    with pytest.raises(EngineLoadError, match="package_that_is_not_installed"):
        registry.create(FAKE, lambda progress: None)
