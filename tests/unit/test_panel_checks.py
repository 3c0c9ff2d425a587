"""The tools that check panels: recordings, their replay, and what counts as a fault."""

from __future__ import annotations

import re
import time
from pathlib import Path

import httpx
import pytest

from benchmarks.metrics_cost import full_metrics
from grafana.build import DASHBOARDS
from grafana.check_panels import Verdict, judge, replaying, show
from grafana.prometheus import scraping
from grafana.queries import filled, of_gpu
from grafana.record import read, write
from tests.promtool import find

RECORDINGS = sorted((Path(__file__).resolve().parents[2] / "grafana" / "recordings").glob("*.xz"))


def test_a_recording_comes_back_page_by_page(tmp_path: Path) -> None:
    page = full_metrics().render().decode()
    pages = [page.replace(" 64.0", f" {number}.0") for number in range(60)]
    write(tmp_path / "load.xz", pages)
    assert read(tmp_path / "load.xz") == pages
    assert (tmp_path / "load.xz").stat().st_size < len(page)


def test_a_replay_gives_the_next_page_at_each_scrape() -> None:
    with replaying(["a 1\n", "a 2\n"]) as port:
        answers = [httpx.get(f"http://127.0.0.1:{port}/metrics").text for _ in range(3)]
    assert answers == ["a 1\n", "a 2\n", "a 2\n"]


def test_the_faults_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert show([Verdict("a: b", "c", 1, 2.0), Verdict("a: d", "e", 0, None, "empty")]) == 1
    assert "2 queries, 1 with a fault" in capsys.readouterr().out


@pytest.mark.skipif(
    find("prometheus") is None,
    reason="prometheus is not here: apt-get install prometheus, or PROMETHEUS_FOLDER=the folder that holds it",
)
def test_a_real_prometheus_says_what_is_there_and_what_is_not() -> None:
    with replaying([full_metrics().render().decode()]) as port, scraping(port) as prometheus:
        deadline = time.monotonic() + 20
        while not prometheus.over("slimserve_gpu_power_watts", time.time() - 2, time.time(), 1.0):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        now = time.time()
        good = judge("p", "q", prometheus, filled('slimserve_gpu_power_watts{instance=~"$instance"}'), now)
        assert (good.fault, good.series, good.last) == ("", 1, 1.0)
        assert judge("p", "q", prometheus, "slimserve_nothing", now).fault == "empty"
        assert judge("p", "q", prometheus, "up / 0", now).fault == "not finite"
        assert "parse error" in judge("p", "q", prometheus, "sum(", now).fault


@pytest.mark.parametrize("file", RECORDINGS, ids=lambda file: file.stem)
def test_a_recording_has_what_the_panels_of_gpus_ask_for(file: Path) -> None:
    pages = read(file)
    assert len(pages) >= 60
    queries = [query.expression for board in DASHBOARDS.values() for panel in board.panels for query in panel.queries]
    named = {name for query in queries if of_gpu(query) for name in re.findall(r"slimserve_[a-z_]+", query)}
    for name in named:
        assert all(f"\n{name}{{" in page for page in pages), name
