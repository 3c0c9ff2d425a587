"""The folder that keeps compiled kernels: one for each version of Triton and kind of GPU, bounded in size.

Triton writes an entry's files under other names and renames them, its list of files last, so that several processes
can use one folder. What one engine needs is remembered by a list: while that is there with all its entries, nothing
has to be compiled for it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

ENGINES = Path(__file__).parents[2]
LISTS = ".lists"
MOST_BYTES = 1 << 30
"""Of one version's and GPU's kernels. A large model's are some 20 MB."""
SAFE_SECONDS = 24 * 3600.0
"""What was used or written so lately is kept, however much there is: somebody may be at it."""
STALE_SECONDS = 60 * 24 * 3600.0
"""What no start has used for so long goes: a list, and with all its lists the folder of a version and GPU."""


def compiled_folder() -> Path:
    """Where all compiled kernels are kept, under the folder that also holds models: ``SLIMSERVE_HOME``, or XDG's."""
    if home := os.environ.get("SLIMSERVE_HOME"):
        return Path(home).expanduser().absolute() / "triton"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "slimserve" / "triton"


def choose_folder(triton_version: str, gpu: str, capability: tuple[int, int]) -> Path:
    """The one of this version and GPU, which Triton then uses; ``TRITON_CACHE_DIR`` names another one."""
    name = re.sub("[^a-z0-9.]+", "-", f"{triton_version} {gpu} sm{capability[0]}{capability[1]}".lower())
    folder = os.environ.setdefault("TRITON_CACHE_DIR", str(compiled_folder() / name.strip("-")))
    # Only binaries: the stages on the way to them take three times the room, and time to read.
    os.environ.setdefault("TRITON_STORE_BINARY_ONLY", "1")
    return Path(folder)


@cache
def sources_digest() -> str:
    """Hex, over all that decides which kernels there are: the engines' code and tables."""
    digest = hashlib.sha256()
    for path in sorted(path for kind in ("*.py", "*.json") for path in ENGINES.rglob(kind)):
        digest.update(path.relative_to(ENGINES).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def remove_stale(now: float | None = None) -> None:
    """Folders of versions and GPUs that no start has used for long."""
    now = time.time() if now is None else now
    for lists in compiled_folder().glob(f"*/{LISTS}"):
        used = max((path.stat().st_mtime for path in (lists, *lists.iterdir())), default=now)
        if now - used > STALE_SECONDS:
            shutil.rmtree(lists.parent, ignore_errors=True)


class BinaryCache:
    """One folder of compiled kernels."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has_all(self, needs: str) -> bool:
        """Whether all entries of that list are there; they then count as used now."""
        path = self._list(needs)
        try:
            entries = path.read_text().split()
            os.utime(path)
        except OSError:
            return False
        return all((self._folder / entry).is_dir() for entry in entries)

    def remember(self, needs: str, entries: Collection[str]) -> None:
        """Keep a list of what somebody needs, under a name of letters and digits. Raises OSError."""
        path = self._list(needs)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text("\n".join(sorted(entries)))
        draft.replace(path)

    def trim(self, most_bytes: int = MOST_BYTES, now: float | None = None) -> int:
        """Remove what no recent list names, the oldest first, until at most ``most_bytes`` are left. Returns bytes."""
        now = time.time() if now is None else now
        kept = self._listed(now)
        sizes: dict[Path, tuple[float, int]] = {}
        for entry in self._entries():
            sizes[entry] = (
                entry.stat().st_mtime,
                sum(file.stat().st_size for file in entry.rglob("*") if file.is_file()),
            )
        surplus = sum(size for _, size in sizes.values()) - most_bytes
        removed = 0
        for entry, (changed, size) in sorted(sizes.items(), key=lambda item: item[1][0]):
            if removed >= surplus:
                break
            if entry.name not in kept and now - changed > SAFE_SECONDS:
                shutil.rmtree(entry, ignore_errors=True)
                removed += size
        return removed

    def _entries(self) -> Iterator[Path]:
        return (path for path in self._folder.iterdir() if path.is_dir() and path.name != LISTS)

    def _listed(self, now: float) -> set[str]:
        found: set[str] = set()
        for path in (self._folder / LISTS).glob("*"):
            if now - path.stat().st_mtime > STALE_SECONDS:
                path.unlink(missing_ok=True)
            else:
                found.update(path.read_text().split())
        return found

    def _list(self, needs: str) -> Path:
        return self._folder / LISTS / needs
