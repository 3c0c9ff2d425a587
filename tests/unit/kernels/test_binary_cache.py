from __future__ import annotations

import os
from pathlib import Path

import pytest

from engines.kernels.cuda.binary_cache import SAFE_SECONDS, STALE_SECONDS, BinaryCache, choose_folder, remove_stale

NOW = 10 * STALE_SECONDS


def make_entry(folder: Path, name: str, size: int, age: float) -> Path:
    entry = folder / name
    entry.mkdir(parents=True)
    (entry / "kernel.cubin").write_bytes(b"x" * size)
    os.utime(entry, (NOW - age, NOW - age))
    return entry


def age_list(folder: Path, needs: str, age: float) -> None:
    os.utime(folder / ".lists" / needs, (NOW - age, NOW - age))


def test_each_version_and_gpu_has_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMSERVE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_STORE_BINARY_ONLY", "1")
    found = set()
    for version, gpu, capability in (
        ("3.6.0", "NVIDIA H200", (9, 0)),
        ("3.7.0", "NVIDIA H200", (9, 0)),
        ("3.6.0", "NVIDIA H100 80GB HBM3", (9, 0)),
        ("3.6.0", "NVIDIA H200", (10, 3)),
    ):
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        found.add(choose_folder(version, gpu, capability))
        assert Path(os.environ["TRITON_CACHE_DIR"]).parent == tmp_path / "triton"
    assert {folder.name for folder in found} == {
        "3.6.0-nvidia-h200-sm90",
        "3.7.0-nvidia-h200-sm90",
        "3.6.0-nvidia-h100-80gb-hbm3-sm90",
        "3.6.0-nvidia-h200-sm103",
    }
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine"))
    assert choose_folder("3.6.0", "NVIDIA H200", (9, 0)) == tmp_path / "mine"


def test_a_start_counts_as_use(tmp_path: Path) -> None:
    cache = BinaryCache(tmp_path)
    make_entry(tmp_path, "K", 1000, STALE_SECONDS + 1)
    cache.remember("a", ["K"])
    used = tmp_path / ".lists" / "a"
    os.utime(used, (0, 0))
    assert cache.has_all("a")
    assert used.stat().st_mtime > 0


def test_a_list_counts_while_all_its_entries_are_there(tmp_path: Path) -> None:
    cache = BinaryCache(tmp_path)
    assert not cache.has_all("a")
    first = make_entry(tmp_path, "K1", 1, 0)
    make_entry(tmp_path, "K2", 1, 0)
    cache.remember("a", ["K1", "K2"])
    assert cache.has_all("a")
    (first / "kernel.cubin").unlink()
    first.rmdir()
    assert not cache.has_all("a")


def test_trimming_takes_the_oldest_that_nobody_needs(tmp_path: Path) -> None:
    cache = BinaryCache(tmp_path)
    old = [make_entry(tmp_path, f"OLD{age}", 1000, SAFE_SECONDS + age) for age in (30, 20, 10)]
    needed = make_entry(tmp_path, "NEEDED", 1000, SAFE_SECONDS + 40)
    fresh = make_entry(tmp_path, "FRESH", 1000, 60)
    cache.remember("a", ["NEEDED"])
    age_list(tmp_path, "a", 60)
    assert cache.trim(most_bytes=5000, now=NOW) == 0
    assert cache.trim(most_bytes=3500, now=NOW) == 2000
    assert [entry.exists() for entry in (*old, needed, fresh)] == [False, False, True, True, True]
    # However small the bound, what somebody needs, or may be at, stays.
    assert cache.trim(most_bytes=0, now=NOW) == 1000
    assert [entry.exists() for entry in (*old, needed, fresh)] == [False, False, False, True, True]


def test_a_list_that_no_start_uses_keeps_nothing(tmp_path: Path) -> None:
    cache = BinaryCache(tmp_path)
    entry = make_entry(tmp_path, "K", 1000, STALE_SECONDS + 1)
    cache.remember("a", ["K"])
    age_list(tmp_path, "a", STALE_SECONDS + 1)
    cache.trim(most_bytes=0, now=NOW)
    assert not entry.exists()
    assert not cache.has_all("a")


def test_versions_that_no_start_uses_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMSERVE_HOME", str(tmp_path))
    for name, age in (("old", STALE_SECONDS + 1), ("used", 60)):
        make_entry(tmp_path / "triton" / name, "K", 1000, age)
        BinaryCache(tmp_path / "triton" / name).remember("a", ["K"])
        age_list(tmp_path / "triton" / name, "a", age)
        os.utime(tmp_path / "triton" / name / ".lists", (NOW - age, NOW - age))
    (tmp_path / "triton" / "somebody's").mkdir()
    remove_stale(now=NOW)
    assert {path.name for path in (tmp_path / "triton").iterdir()} == {"used", "somebody's"}
