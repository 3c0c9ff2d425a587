from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from compression.errors import CompressionError
from compression.measures.texts import final_number, read_questions, read_text, token_windows
from server.text import ModelText, load_text
from tests.unit.api.harness import write_model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelText]:
    loaded = load_text(write_model(tmp_path_factory.mktemp("model")))
    yield loaded
    loaded.close()


def test_windows_do_not_overlap_and_leave_only_the_end_out(text: ModelText) -> None:
    content = "".join(chr(97 + index % 26) for index in range(107))
    windows, count = token_windows(text, content, 10, None, "text")
    assert (windows.shape, count) == ((10, 10), 10)
    assert bytes(windows.flatten().tolist()).decode() == content[:100]


def test_fewer_windows_are_spread_over_the_whole_text(text: ModelText) -> None:
    content = "".join(chr(97 + index) * 10 for index in range(9))
    windows, count = token_windows(text, content, 10, 3, "text")
    assert count == 9
    assert [chr(window[0]) for window in windows] == ["a", "e", "i"]


def test_a_text_longer_than_the_context_is_tokenized_as_a_whole(text: ModelText) -> None:
    windows, count = token_windows(text, "x" * 5000, 100, None, "text")
    assert (len(windows), count) == (50, 50)


def test_a_short_text_is_refused(text: ModelText) -> None:
    with pytest.raises(CompressionError, match=r"notes\.txt has 9 tokens, and one window needs 10"):
        token_windows(text, "x" * 9, 10, None, "notes.txt")


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe\x00", "is not UTF-8 text"), (None, "cannot be read: No such file")]
)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "notes.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CompressionError, match=message) as caught:
        read_text(path)
    assert str(tmp_path) not in str(caught.value)


def test_questions_are_the_last_of_the_file_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    lines = [{"question": f"q{index}", "answer": f"It is {index}.\n#### 1,{index:03}"} for index in range(5)]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    questions = read_questions(path, 2)
    assert [(each.question, each.answer) for each in questions] == [("q3", "1003"), ("q4", "1004")]


@pytest.mark.parametrize("line", ["[1]", "{", '{"question": "q"}', '{"question": "q", "answer": "none"}', "3"])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "q", "answer": "#### 1"}\n' + line)
    with pytest.raises(CompressionError, match=r"questions\.jsonl, line 2"):
        read_questions(path, 5)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("#### 18", "18"),
        ("So 3 and 4 make 7.", "7"),
        ("costs $1,234.50", "1234.5"),
        ("2.0", "2"),
        ("-5 degrees", "-5"),
        ("9 then #### 10 apples", "10"),
        ("none", None),
    ],
)
def test_final_numbers(answer: str, number: str | None) -> None:
    assert final_number(answer) == number
