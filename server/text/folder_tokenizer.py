"""Tokenizer and chat template of a Hugging Face folder: ``tokenizer.json``, ``tokenizer_config.json`` and friends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engines.protocol import EngineLoadError
from server.text.source import SPECIAL_TOKENS, TextSource

LARGEST_FILE = 128 << 20
"""Bytes. The largest vocabularies in use take some 35 MB."""


def read_folder_text(folder: Path) -> TextSource | None:
    """None where the folder has no ``tokenizer.json``. Raises EngineLoadError for files that cannot be used."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_str(_read_text(path))
    except EngineLoadError:
        raise
    except Exception as error:  # the tokenizers package raises plain Exception
        raise EngineLoadError(f"tokenizer.json cannot be read: {error}. Download the model again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = _read_object(folder / "special_tokens_map.json") | _read_object(folder / "tokenizer_config.json")
    return TextSource(
        tokenizer=tokenizer,
        special_tokens=_special_tokens(config),
        add_bos=config["add_bos_token"] if isinstance(config.get("add_bos_token"), bool) else None,
        chat_template=_chat_template(folder, config),
    )


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise EngineLoadError(f"{path.name} is larger than {LARGEST_FILE >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EngineLoadError(f"{path.name} cannot be read as UTF-8 text. Download the model again.") from error


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise EngineLoadError(f"{path.name} is not JSON. Download the model again.") from error
    if not isinstance(value, dict):
        raise EngineLoadError(f"{path.name} is not a JSON object. Download the model again.")
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """``chat_template.jinja`` wins over ``tokenizer_config.json``, where the template may be a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    value = config.get("chat_template") or _read_object(folder / "chat_template.json").get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
    return value if isinstance(value, str) else None
