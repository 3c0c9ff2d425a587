"""Progress as commands show it."""

from __future__ import annotations

import io

from rich.console import Console

from server.display import ProgressLines, duration


def lines(terminal: bool) -> tuple[ProgressLines, io.StringIO]:
    written = io.StringIO()
    return ProgressLines(Console(file=written, force_terminal=terminal, width=100)), written


def test_a_step_writes_a_line_a_tenth_with_the_time_left() -> None:
    shown, written = lines(terminal=False)
    for done in range(101):
        shown.step("comparing", done, 100, None if not done else 10.0 * (100 - done))
    shown.step("plotting", 0, 0, None)
    shown.close()
    found = written.getvalue().splitlines()
    assert found[:3] == ["comparing", "comparing, 15 min left", "comparing, 13 min left"]
    assert found[-2:] == ["comparing, 0 s left", "plotting"]
    assert len(found) == 12


def test_downloads_write_a_line_a_phase() -> None:
    shown, written = lines(terminal=False)
    for done in range(5):
        shown.update("small", "downloading", done, 98_400_000)
    shown.update("small", "verifying files")
    assert written.getvalue().splitlines() == ["small: downloading (98.4 MB)", "small: verifying files"]


def test_a_terminal_shows_bytes_first_and_then_steps() -> None:
    shown, written = lines(terminal=True)
    shown.update("small", "downloading", 10_000_000, 98_400_000)
    shown.end("small")
    shown.step("layer 1 of 30", 1, 30, 290.0)
    shown.step("layer 2 of 30", 2, 30, 280.0)
    shown.close()
    text = written.getvalue()
    assert "98.4 MB" in text
    assert "5 min left" in text
    assert text.index("small: downloading") < text.index("layer 2 of 30")


def test_durations_for_people() -> None:
    assert [duration(seconds) for seconds in (45.4, 720, 10_800)] == ["45 s", "12 min", "3.0 h"]
