from __future__ import annotations

import random

import pytest

from server.text import StopStrings


def feed(stops: list[str], chunks: list[str]) -> tuple[str, bool]:
    """All that is given out, and whether it stopped."""
    cutter = StopStrings(stops)
    given = ""
    for chunk in chunks:
        piece, stopped = cutter.push(chunk)
        given += piece
        if stopped:
            return given, True
    return given + cutter.flush(), False


def cut(stops: list[str], text: str) -> tuple[str, bool]:
    """The definition: the stop string that is complete first, and of those the longest."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return text[: end - max(map(len, matches))], True
    return text, False


def pieces(draw: random.Random, text: str) -> list[str]:
    borders = sorted(draw.sample(range(len(text) + 1), min(len(text), draw.randint(0, 6))))
    return [text[start:end] for start, end in zip([0, *borders], [*borders, len(text)], strict=True)]


def test_without_stop_strings_all_passes_at_once() -> None:
    assert StopStrings([]).push("abc") == ("abc", False)
    assert StopStrings([""]).push("abc") == ("abc", False)


def test_holds_back_just_what_could_become_a_stop_string() -> None:
    cutter = StopStrings(["\nUser:", "###"])
    assert cutter.push("one #") == ("one ", False)
    assert cutter.push(" two") == ("# two", False)
    assert cutter.push(" three\nUs") == (" three", False)
    assert cutter.push("a\n#") == ("\nUsa\n", False)
    assert cutter.push("##") == ("", True)


def test_what_was_held_comes_at_the_end() -> None:
    cutter = StopStrings(["abcd"])
    assert cutter.push("xabc") == ("x", False)
    assert cutter.flush() == "abc"
    assert cutter.flush() == ""


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["abc", "b"], "xabc", ("xa", True)),
        (["aab"], "aaaab", ("aa", True)),
        (["bc", "abc"], "zabc", ("z", True)),
        (["好"], "你好", ("你", True)),
        (["]"], "a[b]c", ("a[b", True)),
        (["^", "-", "\\"], "a\\", ("a", True)),
    ],
)
def test_which_match_wins(stops: list[str], text: str, expected: tuple[str, bool]) -> None:
    assert cut(stops, text) == expected
    assert feed(stops, [text]) == expected
    assert feed(stops, list(text)) == expected


def test_the_cut_does_not_depend_on_token_borders() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        stops = ["".join(draw.choices("ab#", k=draw.randint(1, 5))) for _ in range(draw.randint(1, 4))]
        text = "".join(draw.choices("ab#", k=draw.randint(0, 20)))
        assert feed(stops, pieces(draw, text)) == cut(stops, text), (stops, text)


def test_never_holds_more_than_a_beginning_of_a_stop_string() -> None:
    draw = random.Random(1)
    for _ in range(500):
        stops = ["".join(draw.choices("ab", k=draw.randint(2, 6))) for _ in range(2)]
        cutter = StopStrings(stops)
        text = given = ""
        for char in draw.choices("abc", k=15):
            text += char
            piece, stopped = cutter.push(char)
            if stopped:
                break
            given += piece
            held = text.removeprefix(given)
            beginnings = [text[-k:] for stop in stops for k in range(1, len(stop)) if text.endswith(stop[:k])]
            assert held == max(beginnings, key=len, default="")
