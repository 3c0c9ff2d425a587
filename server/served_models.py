"""From an entry of the configuration to what the API needs of a model: its files, manifest and tokenizer."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engines.fake import FAKE_VOCAB
from engines.manifest import Manifest, read_manifest
from engines.plain_model import read_plain_model
from server.api.state import Model, PlainModel, ServedModel
from server.catalog import resolve
from server.quality import check_quality, read_quality
from server.settings import ModelSettings
from server.text import load_text
from server.text.encoder import read_text_encoder

FAKE_CONTEXT = 2048
"""Tokens, until the fake engine says what it has."""


@dataclass(frozen=True, slots=True)
class LocatedModel:
    """One entry of the configuration and where its files are."""

    settings: ModelSettings
    path: Path


class PullDisplay(Protocol):
    """Who is told how far a download is, from whatever thread. ``name`` is the one that requests use."""

    def pulling(self, name: str, what: str, done: int, total: int) -> None:
        """So many bytes of ``total``; 0 where that is not known."""

    def pulled(self, name: str) -> None:
        """It is here."""


def locate(entry: ModelSettings, display: PullDisplay) -> LocatedModel:
    """Fetches what is not here yet. Raises CommandFailed and UsageError."""
    if entry.kind == "fake":
        return LocatedModel(entry, Path(os.devnull))
    name = entry.served_name
    path = resolve(entry.source, lambda what, done, total: display.pulling(name, what, done, total))
    display.pulled(name)
    return LocatedModel(entry, path)


def read_model(model: LocatedModel) -> Model:
    """Starts the process that renders a language model's template: close it. Raises EngineLoadError."""
    if model.settings.kind == "onnx":
        folder = read_plain_model(model.path).file.parent
        encoder = read_text_encoder(folder) if model.path.is_dir() else None
        return PlainModel(name=model.settings.served_name, created=int(time.time()), encoder=encoder)
    manifest = _manifest(model)
    quality = read_quality(model.path)
    check_quality(model.settings.served_name, quality, model.settings.min_quality)
    return ServedModel(
        name=model.settings.served_name,
        created=int(time.time()),
        manifest=manifest,
        text=load_text(manifest),
        max_model_len=min(manifest.max_context, model.settings.max_model_len or manifest.max_context),
        quality=quality,
    )


def _manifest(model: LocatedModel) -> Manifest:
    if model.settings.kind == "generation":
        return read_manifest(model.path, model.settings.random_weights is not None)
    return Manifest(
        source=Path(os.devnull),
        format="safetensors",
        architecture="llama",
        config={},
        dtype="float32",
        max_context=model.settings.max_model_len or FAKE_CONTEXT,
        vocab_size=FAKE_VOCAB,
        bos_token_id=None,
        eos_token_ids=(),
        sampling_defaults={},
        files=(),
        fingerprint="fake",
    )
