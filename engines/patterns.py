"""Regular expressions out of a model's files, which are not trusted: only those that match in bounded time.

Python's matcher tries one way after the other, so that a pattern of a few characters can keep it busy for years. Two
things make that so: repetitions of what can itself match in several ways, which are refused, and many choices in a
row, whose ways are counted. What real files have, names with ``.*``, ``\\d+`` and alternatives, stays far below.
"""

from __future__ import annotations

import math
import re
import warnings

from engines.protocol import EngineLoadError

LONGEST_PATTERN = 1000
LONGEST_NAME = 60
"""Of a layer; repetitions can end at any place of it."""
MOST_WAYS = 10**8
"""Of matching one name, at the very worst: some seconds."""
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?(?:[:=!]|<[=!]|P<\w+>)|\{\d*,?\d*\}|.", re.DOTALL)
_REPEATS = re.compile(r"[*+]|\{\d*,\d*\}")
_COUNTED = re.compile(r"\{\d*\}")


def compile_pattern(pattern: str, where: str) -> re.Pattern[str]:
    """``where`` stands in errors. Raises EngineLoadError for what is no expression, or could take very long."""
    shown = f"{where}: {pattern[:80]!r}"
    if len(pattern) > LONGEST_PATTERN:
        raise EngineLoadError(f"{shown} is longer than the {LONGEST_PATTERN} characters that are read")
    try:
        with warnings.catch_warnings():
            # Python warns of sets that it will read otherwise in a later version.
            warnings.simplefilter("error")
            compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError, FutureWarning, DeprecationWarning) as error:
        raise EngineLoadError(f"{shown} is no regular expression") from error
    problem = _Scan().problem(_TOKEN.findall(pattern))
    if problem:
        raise EngineLoadError(f"{shown} {problem}, so that matching could take very long; list the layers by name")
    return compiled


class _Scan:
    """Goes once through the tokens of a valid expression."""

    def __init__(self) -> None:
        self._open: list[bool] = []
        """Of each open group: whether what stands in it can match in several ways."""
        self._ambiguous = False
        """Whether the last atom can."""
        self._repetitions = 0
        self._choices = 1

    def problem(self, tokens: list[str]) -> str:
        """Empty for a pattern that is quick."""
        before = ""
        for place, token in enumerate(tokens):
            if token == "(" and tokens[place + 1] == "?":
                return "sets flags, has a condition or refers to a group"
            suffix = token in "?+" and bool(_REPEATS.fullmatch(before) or _COUNTED.fullmatch(before) or before == "?")
            if (_REPEATS.fullmatch(token) or _COUNTED.fullmatch(token)) and not suffix and self._ambiguous:
                return "repeats what repeats itself or has alternatives"
            if not suffix:
                self._take(token)
            before = "" if suffix else token
            if math.comb(LONGEST_NAME + self._repetitions, self._repetitions) * self._choices > MOST_WAYS:
                return "has too many repetitions and alternatives"
        return ""

    def _take(self, token: str) -> None:
        if token.startswith("("):
            self._open.append(False)
            self._ambiguous = False
        elif token == ")":
            self._ambiguous = self._open.pop()
        elif _REPEATS.fullmatch(token):
            self._repetitions += 1
            self._choose(1)
        elif token == "|" and not self._open:
            # Alternatives of the whole pattern are tried one after the other: their ways do not multiply.
            self._repetitions, self._choices, self._ambiguous = 0, 1, False
        elif token in "|?":
            self._choose(2)
        elif not _COUNTED.fullmatch(token):
            self._ambiguous = False

    def _choose(self, ways: int) -> None:
        self._choices *= ways
        self._ambiguous = True
        self._open = [True] * len(self._open)
