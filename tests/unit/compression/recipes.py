"""Recipes as tests write them."""

from __future__ import annotations

from typing import Any

import yaml

from compression.recipe import Recipe, parse_recipe


def recipe(*rules: dict[str, Any], **fields: Any) -> Recipe:
    """One rule for each mapping; a rule without ``match`` is for all layers."""
    layers = [{"match": ["*"], **rule} for rule in rules]
    return parse_recipe(yaml.safe_dump({"layers": layers, **fields}), "test")
