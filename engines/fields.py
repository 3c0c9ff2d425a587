"""Typed reading of a model's JSON or metadata: a wrong file fails with the key's name and what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engines.protocol import EngineLoadError

LARGEST_COUNT = 1 << 31
"""No size in a model's config reaches this; a larger one is a damaged or hostile file."""


class Fields:
    """Values of one mapping, each read with its type. ``name`` is the file's name, for errors."""

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self.values = values
        self.name = name

    def fail(self, key: str, expected: str) -> EngineLoadError:
        """The error that says which key of which file is wrong."""
        shown = repr(self.values.get(key))[:80]
        return EngineLoadError(f"{self.name}: {key} must be {expected}, not {shown}")

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self.values.get(key) is not None

    def count(self, key: str, default: int | None = None, most: int = LARGEST_COUNT) -> int:
        """A whole number from 1 to ``most``. Raises EngineLoadError if it is not, or absent without a default."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= most:
            raise self.fail(key, f"a whole number between 1 and {most}")
        return value

    def optional_count(self, key: str, most: int = LARGEST_COUNT) -> int | None:
        """As ``count``, None where the key is absent or null."""
        return self.count(key, most=most) if self.has(key) else None

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0. Raises EngineLoadError if it is something else, or absent without a default."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.fail(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false; ``default`` where the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string. Raises EngineLoadError if it is something else, or absent without a default."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, "a string")
        return value

    def section(self, key: str) -> Fields:
        """A nested mapping, empty where the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return Fields({}, self.name)
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return Fields(value, f"{self.name}: {key}")

    def texts(self, key: str) -> list[str]:
        """A list of strings; empty where the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(key, "a list of strings")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; empty where the key is absent or null."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(token) is int and 0 <= token < LARGEST_COUNT for token in ids):
            raise self.fail(key, "a token id or a list of token ids")
        return tuple(ids)
