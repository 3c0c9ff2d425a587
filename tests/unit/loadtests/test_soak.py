"""What a soak judges by: memory, panels, limits; and its page."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

from benchmarks.simulation.traces import recorded
from grafana.check_panels import Verdict
from loadtests.figures import Figures, Limit
from loadtests.memory import MIB, MemoryLog, Sampler, resident
from loadtests.run import HERE, Plan
from loadtests.soak import check_panels
from loadtests.soak_report import Soak, write_report

PLAN = Plan(seconds=600, users=2, pace=1, length_scale=1, disconnects=0, limits=HERE / "soak.toml")


def memory(*mib: tuple[float, int]) -> MemoryLog:
    return MemoryLog([(when, held * MIB) for when, held in mib])


def soak(log: MemoryLog, *panels: Verdict) -> Soak:
    figures = {"all": Figures(complete=5, refused=1)}
    return Soak("m", PLAN, 120.0, log, figures, [Limit("all", "requests", 6)], panels=list(panels))


def test_memory_at_a_moment_is_the_median_around_it() -> None:
    log = memory((100, 9), (110, 4), (120, 5), (130, 900), (136, 900), (595, 6))
    assert log.at(120) == 5 * MIB
    assert log.growth(120, 600) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="near second 300"):
        log.at(300)


def test_samples_count_from_the_beginning() -> None:
    seconds = count(100.0)
    sampler = Sampler(1, clock=lambda: next(seconds), read=lambda pid: pid * 10)
    sampler.sample()
    sampler.sample()
    assert sampler.log.samples == [(1.0, 10), (2.0, 10)]


def test_memory_of_children_counts() -> None:
    alone = resident(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert resident(os.getpid()) > alone
        child.communicate(b"\n")
    assert resident(child.pid) == 0


@pytest.mark.parametrize(("end", "missed"), [(104, []), (106, ["memory changed by +6.0%"]), (96, []), (94, 1)])
def test_memory_may_hardly_change(end: int, missed: list[str] | int) -> None:
    found = soak(memory((120, 100), (600, end))).missed()
    assert found == missed or len(found) == missed


def test_what_was_missed_is_said() -> None:
    found = soak(memory((120, 100), (600, 100)), Verdict("a: b", "p95", 0, None, "empty"))
    found.limits.append(Limit("all", "failures_share", 0))
    assert found.missed() == ["panel a: b (p95): empty"]
    found.figures["all"] = Figures(failed=1)
    assert found.missed()[0] == "2 limits"


def test_empty_panels_are_asked_again_after_a_burst() -> None:
    empty, full, other = Verdict("a", "", 0, None, "empty"), Verdict("a", "", 1, 1.0), Verdict("b", "", 1, 2.0)
    looks, bursts = iter([[empty, other], [full, empty]]), []
    assert check_panels(lambda: next(looks), lambda: bursts.append(1)) == [full, other]
    assert bursts == [1]


def test_full_panels_need_no_burst() -> None:
    bursts: list[int] = []
    assert check_panels(lambda: [Verdict("b", "", 1, 2.0)], lambda: bursts.append(1)) == [Verdict("b", "", 1, 2.0)]
    assert not bursts


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    found = soak(memory((0, 10), (120, 100), (600, 101)), Verdict("a: b", "p95", 1, 2.0))
    text = write_report(found, tmp_path).read_text()
    assert "# A soak of 10 minutes" in text
    assert "**passed**" in text
    assert "100 MiB after 120 s, 101 MiB at the end, +1.00%" in text
    assert "| all | 6 | 0 | 1 | 0 |" in text
    assert "1 queries of both dashboards" in text
    assert ("from the recordings" in text) is recorded("azure-code")
    picture = (tmp_path / "images" / "soak.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 300_000


def test_skipped_panels_are_said(tmp_path: Path) -> None:
    found = soak(memory((120, 100), (600, 101)))
    found.panels_skipped = "prometheus is not here"
    assert "Panels were not checked: prometheus is not here." in write_report(found, tmp_path).read_text()
