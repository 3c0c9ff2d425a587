"""Compiled packages on disk: found by what they were made of, written and read by this project alone.

A package holds machine code and its reader may unpickle, so a file from anybody else is never opened: there is no way
to give a path, and a package counts only if this user wrote it, nobody else may write there, and its bytes are those
that were recorded when it was built.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from engines.kernels.cuda.binary_cache import compiled_folder
from engines.protocol import EngineLoadError

PACKAGE = "model.pt2"
RECORD = "package.json"

Target = Literal["cpu", "cuda"]
Dtype = Literal["fp32", "fp16", "bf16"]


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One input or output of a compiled model."""

    name: str
    dtype: str
    """As numpy names it."""
    shape: tuple[int | str, ...]
    """A free axis by its name, the others by their length."""
    values: int | None = None
    """Of ids: they must be 0 to one less than this; None allows any value."""


class CompiledModel(msgspec.Struct, frozen=True, kw_only=True):
    """What a package is, as its record says."""

    source: str
    """Name of the folder that it was made of, for people."""
    target: Target
    dtype: Dtype
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: dict[str, tuple[int, int]]
    """The shortest and the longest that each free axis may be."""
    kernels: int
    """Of our compiler's making; calls of libraries come besides."""
    seconds: float
    """That compiling took."""
    sha256: str
    """Of the package."""


class PackageKey(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides what a package contains."""

    fingerprint: str
    """Of the source model."""
    target: Target
    dtype: Dtype
    device: str
    """Kind of processor, with its vector extensions, or of GPU."""
    torch: str
    sources: str
    """Digest of the code that makes packages."""

    def name(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:40]


def packages_folder() -> Path:
    """Beside the cache's models and kernels."""
    return compiled_folder().parent / "compiled"


def find(key: PackageKey) -> tuple[CompiledModel, Path] | None:
    """The record and package of a key; None where there is none.

    Raises EngineLoadError for one that somebody else wrote or could have written, or that has changed.
    """
    folder = packages_folder() / key.name()
    if not (folder / RECORD).exists():
        return None
    for path in (folder.parent, folder, folder / RECORD, folder / PACKAGE):
        _require_own(path)
    try:
        record = msgspec.json.decode((folder / RECORD).read_bytes(), type=CompiledModel)
        with (folder / PACKAGE).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, msgspec.DecodeError) as error:
        raise EngineLoadError(f"the compiled package of {key.fingerprint[:12]} is damaged; {_again(folder)}") from error
    if found != record.sha256:
        raise EngineLoadError(f"the compiled package of {record.source} has changed; {_again(folder)}")
    return record, folder / PACKAGE


@contextmanager
def writing(key: PackageKey) -> Iterator[Path]:
    """A new private folder; the package and record left in it appear under the key, both or neither."""
    home = packages_folder()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    _require_own(home)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=home))
    try:
        yield draft
        shutil.rmtree(home / key.name(), ignore_errors=True)
        draft.rename(home / key.name())
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _again(folder: Path) -> str:
    return f"remove the folder {folder.name} from the cache's folder 'compiled', and compile the model again"


def _require_own(path: Path) -> None:
    try:
        state = path.lstat()
    except OSError as error:
        raise EngineLoadError(f"the compiled package lacks {path.name}; compile the model again") from error
    others_write = state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if stat.S_ISLNK(state.st_mode) or state.st_uid != os.geteuid() or others_write:
        raise EngineLoadError(
            f"the cache's {path.name} is a link, is owned by another user, or others may write to it: compiled "
            "packages contain machine code and are loaded only where this user alone could have made them"
        )
