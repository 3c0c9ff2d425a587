from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engines import hashes
from engines.hashes import hash_files, verify_files
from engines.protocol import EngineLoadError

CHUNK = 1 << 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(os.urandom(3 * CHUNK + 5))
    (folder / "b.safetensors").write_bytes(os.urandom(CHUNK))
    (folder / "empty.json").write_bytes(b"")
    return folder


def known(folder: Path) -> dict[str, list[str]]:
    return hash_files(sorted(folder.iterdir()), CHUNK)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_chunk_s_hash_is_sha256_of_its_bytes(folder: Path) -> None:
    data, found = (folder / "a.safetensors").read_bytes(), known(folder)
    assert found["a.safetensors"] == [
        hashlib.sha256(data[start : start + CHUNK]).hexdigest() for start in range(0, len(data), CHUNK)
    ]
    assert [len(chunks) for chunks in found.values()] == [4, 1, 1]


@pytest.mark.parametrize("place", [0, CHUNK, 3 * CHUNK + 4])
def test_one_flipped_bit_is_found_wherever_it_is(folder: Path, place: int) -> None:
    expected = known(folder)
    verify_files(folder, expected, CHUNK, None)
    flip(folder / "a.safetensors", place)
    with pytest.raises(EngineLoadError, match=r"a\.safetensors is not what slimserve\.json says"):
        verify_files(folder, expected, CHUNK, None)


@pytest.mark.parametrize("size", [0, CHUNK, 3 * CHUNK, 3 * CHUNK + 4, 3 * CHUNK + 6, 5 * CHUNK])
def test_another_length_is_found(folder: Path, size: int) -> None:
    expected = known(folder)
    os.truncate(folder / "a.safetensors", size)
    with pytest.raises(EngineLoadError, match=r"a\.safetensors is not what"):
        verify_files(folder, expected, CHUNK, None)


def test_a_missing_file_is_named(folder: Path) -> None:
    expected = known(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(EngineLoadError, match=r"b\.safetensors is missing"):
        verify_files(folder, expected, CHUNK, None)


def test_what_was_found_right_is_not_read_again_until_it_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, remembered = known(folder), tmp_path / "home" / "verified"
    read: list[str] = []
    hasher = hashes._hasher

    def noting(path: Path, size: int) -> Callable[[int], str]:
        read.append(path.name)
        return hasher(path, size)

    monkeypatch.setattr(hashes, "_hasher", noting)

    def verified() -> set[str]:
        read.clear()
        verify_files(folder, expected, CHUNK, remembered)
        return set(read)

    assert verified() == set(expected)
    assert verified() == set()
    os.utime(folder / "b.safetensors", (1, 1))
    assert verified() == {"b.safetensors"}
    copy = folder / "copy"
    copy.write_bytes((folder / "a.safetensors").read_bytes())
    stat = (folder / "a.safetensors").stat()
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    copy.replace(folder / "a.safetensors")
    assert verified() == {"a.safetensors"}, "another inode"
    assert verified() == set()
    expected["a.safetensors"][1] = "0" * 64
    with pytest.raises(EngineLoadError):
        verified()


def test_a_wrong_file_is_not_remembered(folder: Path, tmp_path: Path) -> None:
    expected, remembered = known(folder), tmp_path / "verified"
    flip(folder / "a.safetensors", 7)
    for _ in range(2):
        with pytest.raises(EngineLoadError):
            verify_files(folder, expected, CHUNK, remembered)


def test_damaged_memory_and_a_folder_that_cannot_be_written_cost_time_only(folder: Path, tmp_path: Path) -> None:
    expected, remembered = known(folder), tmp_path / "verified"
    verify_files(folder, expected, CHUNK, remembered)
    for memory in remembered.iterdir():
        memory.write_bytes(b"{")
    verify_files(folder, expected, CHUNK, remembered)
    (tmp_path / "file").write_bytes(b"")
    verify_files(folder, expected, CHUNK, tmp_path / "file" / "verified")


def test_progress_counts_the_bytes_that_are_read(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    expected = known(folder)
    verify_files(folder, expected, CHUNK, None, lambda done, total: seen.append((done, total)))
    total = 4 * CHUNK + 5
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
