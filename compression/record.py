"""Writes ``slimserve.json`` into a finished engine folder: coverage with its promises, hashes, fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from compression.coverage import check_promises, count_coverage
from compression.fingerprint import make_fingerprint
from engines.engine_folder import FILE_NAME, EngineRecord, LayerClass, write_engine_record
from engines.hashes import hash_files
from engines.manifest import Manifest, read_manifest

UNHASHED = ("card", ".", FILE_NAME)
"""Beginnings of names of files that may change later, or that the server never reads."""


def write_record(
    folder: Path,
    *,
    recipe: dict[str, Any],
    base: str,
    base_manifest: Manifest,
    notes: list[str],
    promised: Mapping[LayerClass, float],
    device: torch.device,
) -> EngineRecord:
    """The folder must load already; ``device`` computes the fingerprint.

    Raises CompressionError where less is quantized than promised, and EngineLoadError where the folder cannot be
    loaded: then nothing is written.
    """
    coverage = count_coverage(read_manifest(folder), promised)
    check_promises(coverage)
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(UNHASHED))
    record = EngineRecord(
        recipe=recipe,
        base=base,
        base_fingerprint=base_manifest.fingerprint,
        created_with=f"slimserve {version('slimserve')}",
        notes=notes,
        coverage=coverage,
        hashes=hash_files(files),
        fingerprint=make_fingerprint(folder, device),
    )
    write_engine_record(folder, record)
    return record
