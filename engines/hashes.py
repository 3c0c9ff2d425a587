"""Hashes of an engine folder's files: every chunk for itself, several at once, and no file twice in vain."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engines.engine_folder import CHUNK_BYTES, FILE_NAME
from engines.protocol import EngineLoadError

MOST_THREADS = 8
"""Each holds one chunk in memory, and more of them than this only wait for the disk."""

Progress = Callable[[int, int], None]
"""Bytes done, bytes in all."""


class Verified(msgspec.Struct, frozen=True):
    """What a file was when its bytes were last found to be right."""

    size: int
    mtime: int
    """Nanoseconds."""
    inode: int
    expected: str
    """Digest over the hashes that it was compared with."""


@dataclass(frozen=True, slots=True)
class _Task:
    path: Path
    expected: list[str]
    state: Verified


def hash_files(paths: Iterable[Path], chunk_bytes: int = CHUNK_BYTES) -> dict[str, list[str]]:
    """SHA-256 of each chunk, by file name, as ``EngineRecord.hashes`` wants them. Raises OSError."""
    with ThreadPoolExecutor(_threads()) as pool:
        return {path.name: list(pool.map(_hasher(path, chunk_bytes), _starts(path, chunk_bytes))) for path in paths}


def verify_files(
    folder: Path,
    hashes: Mapping[str, list[str]],
    chunk_bytes: int,
    remembered: Path | None,
    report: Progress = lambda done, total: None,
) -> None:
    """Compare the folder's files with what was recorded when they were written.

    ``remembered`` is a folder that keeps which file was found right, so that an unchanged one (by size, modification
    time and inode) is not read again; None reads everything. Raises EngineLoadError that names the first wrong file.
    """
    tasks = [
        task
        for name, expected in hashes.items()
        if _recall(remembered, (task := _task(folder / name, expected)).path) != task.state
    ]
    total, done = sum(task.state.size for task in tasks), 0
    with ThreadPoolExecutor(_threads()) as pool:
        for task in tasks:
            wrong = EngineLoadError(
                f"{task.path.name} is not what {FILE_NAME} says it was when the model was written: it was changed or "
                "damaged since; copy the folder again, or compress the model again"
            )
            if len(_starts(task.path, chunk_bytes)) != len(task.expected):
                raise wrong
            found = pool.map(_hasher(task.path, chunk_bytes), _starts(task.path, chunk_bytes))
            for digest, expected in zip(found, task.expected, strict=True):
                if digest != expected:
                    pool.shutdown(cancel_futures=True)
                    raise wrong
                done = min(done + chunk_bytes, total)
                report(done, total)
            if _task(task.path, task.expected) == task:
                _remember(remembered, task)


def _threads() -> int:
    return min(MOST_THREADS, len(os.sched_getaffinity(0)))


def _starts(path: Path, chunk_bytes: int) -> range:
    return range(0, max(1, path.stat().st_size), chunk_bytes)


def _hasher(path: Path, chunk_bytes: int) -> Callable[[int], str]:
    def digest(start: int) -> str:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(chunk_bytes)).hexdigest()

    return digest


def _task(path: Path, expected: list[str]) -> _Task:
    try:
        stat = path.stat()
    except OSError as error:
        raise EngineLoadError(
            f"{path.name} is missing, and {FILE_NAME} names it; copy the folder again, with all its files"
        ) from error
    over = hashlib.sha256("".join(expected).encode()).hexdigest()
    return _Task(path, expected, Verified(stat.st_size, stat.st_mtime_ns, stat.st_ino, over))


def _memory(remembered: Path, path: Path) -> Path:
    return remembered / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()


def _recall(remembered: Path | None, path: Path) -> Verified | None:
    if remembered is None:
        return None
    try:
        return msgspec.json.decode(_memory(remembered, path).read_bytes(), type=Verified)
    except (OSError, msgspec.DecodeError):
        return None


def _remember(remembered: Path | None, task: _Task) -> None:
    """A folder that cannot be written costs time at the next start and nothing else."""
    if remembered is None:
        return
    try:
        remembered.mkdir(parents=True, exist_ok=True)
        memory = _memory(remembered, task.path)
        partial = memory.with_suffix(f".{os.getpid()}")
        partial.write_bytes(msgspec.json.encode(task.state))
        partial.replace(memory)
    except OSError:
        return
