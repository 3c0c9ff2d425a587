"""Patterns of a model's files: what is used matches as ever, what could hang is refused."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings, strategies

from engines.patterns import LONGEST_NAME, compile_pattern
from engines.protocol import EngineLoadError

LAYER = "model.layers.12.mlp.experts.7.gate_proj"


@pytest.mark.parametrize(
    "pattern",
    [
        r".*mlp.*(gate|up|down)_proj",
        r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj$",
        r".*\.layers\.(1?[0-9]|2[0-3])\..*",
        r"(?!.*self_attn)(?:model\.)?layers.*|.*experts.*",
        r"model\.layers\.\d{2}\..*?gate_proj",
        r"model\.[a-z]+\.[^]]+proj",
        "|".join(rf"model\.layers\.{index}\..*" for index in range(30)),
    ],
)
def test_patterns_as_files_have_them_match(pattern: str) -> None:
    assert compile_pattern(pattern, "config").match(LAYER)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(a+)+$", "repeats what repeats itself"),
        ("(a|a)*$", "repeats what repeats itself"),
        ("(?:x(a*)y){2,}", "repeats what repeats itself"),
        ("((a?)b){20}", "repeats what repeats itself"),
        (".*" * 8 + "!", "too many repetitions"),
        (".?" * 30 + "a" * 30, "too many repetitions"),
        ("(.|.)" * 30 + "!", "too many repetitions"),
        ("(?x)(a+) +", "sets flags"),
        ("(?i:a)", "sets flags"),
        ("a" * 1001, "longer than the 1000"),
        ("(", "no regular expression"),
    ],
)
def test_what_could_take_very_long_is_refused(pattern: str, problem: str) -> None:
    with pytest.raises(EngineLoadError, match=problem):
        compile_pattern(pattern, "config")


@settings(deadline=None, max_examples=300)
@given(strategies.text("ab.()|*+?{2}\\[]", max_size=14))
def test_whatever_is_let_in_is_quick(pattern: str) -> None:
    """On the name that is worst for such patterns: one letter, and an end that does not fit."""
    try:
        compiled = compile_pattern(pattern, "config")
    except EngineLoadError:
        return
    started = time.perf_counter()
    assert (compiled.fullmatch("a" * 24 + "!") is None) == (re.fullmatch(pattern, "a" * 24 + "!") is None)
    assert time.perf_counter() - started < 5


def test_the_worst_that_is_let_in_ends() -> None:
    compiled = compile_pattern(".*a" * 4 + "!", "config")
    assert compiled.match("a" * LONGEST_NAME) is None
