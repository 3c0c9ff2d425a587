"""The data of an evaluation: token windows of a text, and questions with known answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import numpy as np

from compression.errors import CompressionError
from server.text import ModelText

WINDOW = 1024
"""Tokens, the usual length for models of this kind."""
LARGEST_TEXT = 256 << 20
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

Windows = np.ndarray[tuple[int, int], np.dtype[np.int64]]


class Question(msgspec.Struct, frozen=True):
    question: str
    answer: str
    """The final number."""
    solution: str
    """The worked solution that ends in it."""


def read_text(path: Path) -> str:
    """Raises CompressionError for what is no text or too large."""
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise CompressionError(f"{path.name} is larger than {LARGEST_TEXT >> 20} MiB; give a part of it")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CompressionError(f"{path.name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CompressionError(f"{path.name} is not UTF-8 text") from error


def token_windows(text: ModelText, content: str, length: int, most: int | None, name: str) -> tuple[Windows, int]:
    """Windows that do not overlap, (windows, length), and how many the text has in all; its last part is left out.

    The text is tokenized as a whole, with BOS in front where the model wants it. Of more than ``most`` windows, as
    many are taken, evenly spread. Raises CompressionError where the text is shorter than one window.
    """
    tokens = np.asarray(text.encode(content, max_tokens=len(content) + 1), np.int64)
    count = len(tokens) // length
    if not count:
        raise CompressionError(f"{name} has {len(tokens)} tokens, and one window needs {length}; give a longer text")
    windows: Windows = tokens[: count * length].reshape(count, length)
    if most is not None and most < count:
        windows = windows[np.linspace(0, count - 1, most).round().astype(np.int64)]
    return windows, count


def read_questions(path: Path, most: int) -> list[Question]:
    """The last ones of a file in the format of GSM8K: a line of JSON each with ``question`` and ``answer``, which ends
    in ``#### NUMBER``. The last, because calibration takes the first. Raises CompressionError."""
    questions = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            question, solution = entry["question"], entry["answer"]
            answer = final_number(solution)
        except (ValueError, KeyError, TypeError, RecursionError):
            answer = None
        if answer is None:
            raise CompressionError(f"{path.name}, line {number}: no question with an answer that ends in a number")
        questions.append(Question(question, answer, solution))
    if not questions:
        raise CompressionError(f"{path.name} holds no questions")
    return questions[-most:]


def final_number(answer: str) -> str | None:
    """The number behind ``####``, else the last one; written in one way, so that equal numbers are equal texts."""
    numbers = _NUMBER.findall(answer.rpartition("####")[2])
    if not numbers:
        return None
    value = float(numbers[-1].replace(",", ""))
    return str(int(value)) if value == int(value) else str(value)
