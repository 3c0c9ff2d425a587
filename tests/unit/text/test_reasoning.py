from __future__ import annotations

import random

import pytest

from server.text import ReasoningSplitter
from server.text.reasoning import opens_thinking
from tests.unit.text.test_stop_strings import pieces


def split(starts_inside: bool, chunks: list[str]) -> tuple[str, str]:
    splitter = ReasoningSplitter(starts_inside)
    given = [*map(splitter.push, chunks), splitter.flush()]
    return "".join(reasoning for reasoning, _ in given), "".join(content for _, content in given)


@pytest.mark.parametrize(
    ("starts_inside", "text", "expected"),
    [
        (False, "<think>\nwhy\n</think>\n\nbecause", ("why", "because")),
        (False, " \n<think>a</think>b", ("a", "b")),
        (True, "\nwhy\n\nso\n</think>\n\nyes\n", ("why\n\nso", "yes\n")),
        (True, "never closed\n", ("never closed", "")),
        (True, "a < b </thin", ("a < b </thin", "")),
        (True, "</think>ok", ("", "ok")),
        (True, "", ("", "")),
        (False, "plain <think>x</think>", ("", "plain <think>x</think>")),
        (False, "  plain", ("", "  plain")),
        (False, "<thi", ("", "<thi")),
        (False, "\n\n", ("", "\n\n")),
        (False, "<think>a</think>b</think><think>c", ("a", "b</think><think>c")),
        (True, "x</think></think>", ("x", "</think>")),
        (True, "one\n\n<b>two</think>three", ("one\n\n<b>two", "three")),
    ],
)
def test_split(starts_inside: bool, text: str, expected: tuple[str, str]) -> None:
    assert split(starts_inside, [text]) == expected
    assert split(starts_inside, list(text)) == expected


def test_the_split_does_not_depend_on_token_borders() -> None:
    draw = random.Random(0)
    parts = ["<think>", "</think>", "<", "/", "think>", "\n", "a", "</", " "]
    for _ in range(3000):
        text = "".join(draw.choices(parts, k=draw.randint(0, 9)))
        inside = draw.random() < 0.5
        assert split(inside, pieces(draw, text)) == split(inside, [text]), (inside, text)


def test_certain_text_is_not_held() -> None:
    splitter = ReasoningSplitter(True)
    assert splitter.push("thought <") == ("thought ", "")
    assert splitter.push("b") == ("<b", "")
    assert splitter.push("</think>answer <") == ("", "answer <")


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<｜Assistant｜><think>\n", True),
        ("<|im_start|>assistant\n<think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("what does <think> mean?<|im_end|>\n<|im_start|>assistant\n", False),
    ],
)
def test_opens_thinking(prompt: str, opened: bool) -> None:
    assert opens_thinking(prompt) is opened
