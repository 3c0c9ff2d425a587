"""Figures of a run and their limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtests.figures import Figures, Limit, WrongLimits, limits_table, read_limits, summary_table, together
from loadtests.run import HERE

CHAT = Figures(complete=8, failed=1, refused=1, left=2, tokens=50, seconds=5.0, times={"ttft": {10: 6, 300: 2}})
COMPLETION = Figures(complete=2, tokens=10, seconds=5.0, times={"ttft": {10: 1, 20: 1}, "tpot": {3: 2}})


@pytest.mark.parametrize(("percent", "value"), [(1, 10), (50, 10), (75, 10), (76, 300), (99, 300)])
def test_percentiles_are_nearest_ranks(percent: int, value: int) -> None:
    assert CHAT.percentile("ttft", percent) == value


def test_nothing_measured_has_no_percentile_and_no_share() -> None:
    assert Figures().percentile("ttft", 50) is None
    assert (Figures().share(0), Figures().tokens_per_second) == (0, 0)


def test_kinds_are_added() -> None:
    both = together([CHAT, COMPLETION])
    assert (both.requests, both.complete, both.failed, both.refused, both.left) == (14, 10, 1, 1, 2)
    assert both.tokens_per_second == 12
    assert both.times == {"ttft": {10: 7, 20: 1, 300: 2}, "tpot": {3: 2}, "total": {}}


def test_figures_come_back_from_json() -> None:
    assert Figures.from_json(json.loads(json.dumps(CHAT.to_json()))) == CHAT


@pytest.mark.parametrize(
    ("name", "bound", "kept"),
    [
        ("requests", 12, True),
        ("requests", 13, False),
        ("tokens_per_second", 10, True),
        ("tokens_per_second", 10.1, False),
        ("failures_share", 1 / 12, True),
        ("failures_share", 0, False),
        ("refusals_share", 0.1, True),
        ("refusals_share", 0.01, False),
        ("ttft_p75_ms", 10, True),
        ("ttft_p95_ms", 299, False),
        ("tpot_p95_ms", 1e9, False),  # nothing measured
    ],
)
def test_a_limit_is_kept_or_missed(name: str, bound: float, kept: bool) -> None:
    assert Limit("chat", name, bound).kept(CHAT) is kept


def test_the_table_says_which_limit_was_missed() -> None:
    limits = [Limit("chat", "requests", 5), Limit("chat", "ttft_p95_ms", 200), Limit("whole", "tpot_p50_ms", 5)]
    lines, missed = limits_table(limits, {"chat": CHAT})
    assert missed == 2
    assert [line.split() for line in lines[1:]] == [
        ["chat", "requests", ">=", "5", "12", "ok"],
        ["chat", "ttft_p95_ms", "<=", "200", "300", "MISSED"],
        ["whole", "tpot_p50_ms", "<=", "5", "nothing", "MISSED"],
        ["2", "limits", "missed"],
    ]
    assert limits_table(limits[:1], {"chat": CHAT})[0][-1] == "all limits kept"


@pytest.mark.parametrize(("found", "shown"), [(10_000, "10000"), (0, "0"), (30, "30")])
def test_large_figures_are_written_out(found: int, shown: str) -> None:
    figures = Figures(complete=found)
    assert limits_table([Limit("all", "requests", 0)], {"all": figures})[0][1].split()[-2] == shown


def test_the_summary_has_a_row_for_each_kind() -> None:
    rows = [line.split() for line in summary_table({"chat": CHAT, "completion": COMPLETION})]
    assert rows[1] == ["chat", "12", "1", "1", "2", "10.0", "10", "300", "-", "-", "-"]
    assert rows[2][0] == "completion"


def test_limits_are_read(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text("[all]\nfailures_share = 0\n[chat]\nttft_p95_ms = 12.5\n")
    assert read_limits(file) == [Limit("all", "failures_share", 0), Limit("chat", "ttft_p95_ms", 12.5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[all", "limits.toml: "),
        ("[embedding]\nrequests = 1", r"\[embedding\] is no kind"),
        ("requests = 1", r"\[requests\] is no kind"),
        ("chat = 1", "chat. is no limit"),
        ("[chat]\nttft_p95 = 1", "chat.ttft_p95 is no limit"),
        ("[chat]\nttft_p95_ms = true", "is no number"),
        ('[chat]\nttft_p95_ms = "1s"', "is no number"),
        ("[chat]\nrequests = -1", "is no number"),
    ],
)
def test_wrong_limits_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "limits.toml"
    file.write_text(text)
    with pytest.raises(WrongLimits, match=message):
        read_limits(file)


@pytest.mark.parametrize("name", ["limits.toml", "soak.toml"])
def test_shipped_limits_let_nothing_fail(name: str) -> None:
    limits = read_limits(HERE / name)
    assert Limit("all", "failures_share", 0) in limits
    assert Limit("all", "refusals_share", 0.01) in limits
