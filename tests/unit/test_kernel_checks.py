"""What the benchmarks of kernels do with one that is wrong or hangs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kernel_checks import passing, time_apart

KERNELS = """
import sys
import threading

if "--times" in sys.argv:
    print(sys.argv[1:], flush=True)
    threading.Event().wait(10 if "slow" in sys.argv else 0)
    sys.exit(3)
if sys.argv[1:] == ["--check", "slow"]:
    threading.Event().wait(60)
assert sys.argv[1:] == ["--check", "right"], "wrong by 0.25"
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_kernels.py").write_text(KERNELS)
    monkeypatch.chdir(tmp_path)


def test_only_what_is_right_passes(capfd: pytest.CaptureFixture[str]) -> None:
    assert passing("some_kernels", {"wrong": "tile 1", "right": "tile 2", "slow": "tile 3"}, 2) == ["right"]
    first, *others = capfd.readouterr().out.split("tile 3")
    assert first.startswith("tile 1: WRONG: ")
    assert first.endswith("AssertionError: wrong by 0.25\n")
    assert others == [": WRONG: no end after 2 s\n"]


def test_times_are_taken_in_a_process_that_may_not_hang(capfd: pytest.CaptureFixture[str]) -> None:
    assert time_apart("some_kernels", ["0", "4"], 0.5, grace=5) == 3
    assert capfd.readouterr().out == "['--seconds', '0.5', '--times', '0', '4']\n"
    assert time_apart("some_kernels", ["slow"], 0.5, grace=1) == 1
    assert capfd.readouterr().out.endswith("# no end 1 s after the time was over\n")
    assert time_apart("some_kernels", [], 0.5, grace=1) == 1
