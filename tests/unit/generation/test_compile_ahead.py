"""The process that compiles kernels, from the side that waits for it, and the real one on a small model."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.generation import loading
from engines.generation.compile_ahead import STAGES, CompileAhead, Order, Rehearsed, Sizes, start
from engines.kernels.cuda.binary_cache import BinaryCache
from engines.kernels.cuda.tuning import Machine
from engines.protocol import EngineSpec
from tests.unit.generation.tiny_models import LLAMA, load_tiny, model_folder

MEASURED = '{"type": "StageDone", "stage": "measure"}'
STARTED = '{"type": "StageDone", "stage": "start"}'
ALL_DONE = '{"type": "AllDone", "kernels": 3, "seconds": 1.5, "failures": ["x: ValueError: no"]}'


def telling(*lines: str, then: str = "sys.stdin.read()") -> subprocess.Popen[bytes]:
    """A process that says these lines and then waits for the end of its input."""
    code = f"import sys; print({chr(10).join(lines)!r}, flush=True); {then}"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )


def ended(kernels: CompileAhead) -> threading.Event:
    event = threading.Event()
    kernels.when_finished(event.set)
    return event


def let_end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def test_without_a_process_all_is_there() -> None:
    kernels = CompileAhead("m")
    assert not any(kernels.misses(stage) for stage in STAGES)
    assert ended(kernels).is_set()
    kernels.close()


def test_stages_come_one_after_the_other(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    process = telling(STARTED, then=f"sys.stdin.read(); print({ALL_DONE!r}, flush=True)")
    kernels = CompileAhead("m", process)
    finished = ended(kernels)
    kernels.wait("start")
    assert not kernels.misses("measure")
    assert kernels.misses("rest")
    assert not finished.is_set()
    let_end(process)
    kernels.wait("rest")
    assert finished.wait(10)
    process.wait(10)
    assert ended(kernels).is_set()
    _wait_until(lambda: "3 GPU kernels compiled ahead in 1.5 s" in caplog.text and "ValueError: no" in caplog.text)


@pytest.mark.parametrize("end", ["sys.exit(1)", "print('nonsense')"])
def test_a_process_that_fails_holds_nothing_up(end: str, caplog: pytest.LogCaptureFixture) -> None:
    kernels = CompileAhead("m", telling(MEASURED, then=end))
    assert ended(kernels).wait(10)
    assert not any(kernels.misses(stage) for stage in STAGES)
    _wait_until(lambda: "ended early" in caplog.text)


def test_closing_ends_the_process_and_those_it_has_forked() -> None:
    process = telling(MEASURED, then="import os; print(os.fork(), flush=True); sys.stdin.read()")
    kernels = CompileAhead("m", process)
    kernels.wait("measure")
    kernels.close()
    assert process.wait(10) == -signal.SIGKILL
    _wait_until(lambda: not _group_lives(process.pid))


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_until(condition: Callable[[], bool]) -> None:
    """For what other threads and the kernel do a moment later."""
    pause = threading.Event()
    for _ in range(1000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it did not come about")


def test_graphs_are_captured_once_all_kernels_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = telling(STARTED)
    monkeypatch.setattr(loading, "compile_ahead", lambda *_: CompileAhead("m", process))
    engine = load_tiny(model_folder(tmp_path, LLAMA))
    assert not engine.wait_captured(0)
    let_end(process)
    assert engine.wait_captured(10)
    engine.close()


def test_closing_the_engine_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = telling(STARTED)
    monkeypatch.setattr(loading, "compile_ahead", lambda *_: CompileAhead("m", process))
    engine = load_tiny(model_folder(tmp_path, LLAMA))
    engine.close()
    assert process.wait(10) == -signal.SIGKILL
    assert engine.wait_captured(10)


def test_a_load_that_fails_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = telling(STARTED)
    monkeypatch.setattr(loading, "compile_ahead", lambda *_: CompileAhead("m", process))
    monkeypatch.setattr(loading, "load_model", _fail)
    with pytest.raises(RuntimeError, match="no model"):
        load_tiny(model_folder(tmp_path, LLAMA))
    assert process.wait(10) == -signal.SIGKILL


def _fail(*_: object) -> None:
    raise RuntimeError("no model")


def test_two_real_processes_fill_one_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a small model, for a GPU that is not here, both the same kernels at the same time."""
    pytest.importorskip("triton")
    caplog.set_level(logging.INFO)
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    monkeypatch.setenv("TRITON_STORE_BINARY_ONLY", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    engine = Rehearsed(
        spec=EngineSpec(name="tiny", source=str(model_folder(tmp_path, LLAMA)), random_weights=0),
        machine=Machine("NVIDIA H200", (9, 0), 132, 233_472),
        dtype="bfloat16",
        kv_dtype="bfloat16",
        sizes=Sizes(max_rows=2, step_tokens=16, model_len=64, probe_context=64),
    )
    orders = [Order(engine=engine, folder=str(folder), needs=needs, processes=1) for needs in ("first", "second")]
    both = [start(order) for order in orders]
    for kernels in both:
        kernels.wait("rest")
    cache = BinaryCache(folder)
    _wait_until(lambda: cache.has_all("first") and cache.has_all("second"))
    assert (folder / ".lists" / "first").read_text() == (folder / ".lists" / "second").read_text()
    assert len(list(folder.rglob("*.cubin"))) > 10
    assert not list(folder.rglob("tmp.pid*"))
    assert "not compiled" not in caplog.text
    for kernels in both:
        kernels.close()
