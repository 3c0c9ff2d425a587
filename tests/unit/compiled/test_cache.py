"""Packages count only where this user alone could have written them, and only as they were written."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest

from engines.compiled.build import refuse_programs, require_compiler
from engines.compiled.cache import PACKAGE, RECORD, CompiledModel, PackageKey, find, packages_folder, writing
from engines.protocol import EngineLoadError

KEY = PackageKey(fingerprint="f" * 64, target="cpu", dtype="fp32", device="x86", torch="2", sources="s")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a few bytes; nothing here runs it."""
    monkeypatch.setenv("SLIMSERVE_HOME", str(tmp_path))
    write(b"machine code")
    return packages_folder() / KEY.name()


def write(content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    record = CompiledModel(
        source="m", target="cpu", dtype="fp32", inputs=(), outputs=(), axes={}, kernels=1, seconds=1.0, sha256=digest
    )
    with writing(KEY) as folder:
        (folder / PACKAGE).write_bytes(content)
        (folder / RECORD).write_bytes(msgspec.json.encode(record))


def test_a_package_is_found_by_its_key_alone(package: Path) -> None:
    found = find(KEY)
    assert found is not None
    assert found[0].source == "m"
    assert found[1] == package / PACKAGE
    for changes in ({"dtype": "fp16"}, {"torch": "3"}, {"device": "other"}, {"sources": "t"}, {"fingerprint": "0"}):
        assert find(msgspec.structs.replace(KEY, **changes)) is None


def test_a_changed_package_is_refused(package: Path) -> None:
    (package / PACKAGE).write_bytes(b"other code")
    with pytest.raises(EngineLoadError, match="has changed"):
        find(KEY)
    write(b"compiled again")
    assert find(KEY) is not None


@pytest.mark.parametrize("name", ["", PACKAGE, RECORD, ".."])
def test_what_others_may_write_is_refused(package: Path, name: str) -> None:
    (package / name).resolve().chmod(0o777)
    with pytest.raises(EngineLoadError, match="others may write"):
        find(KEY)


def test_a_link_is_refused(package: Path, tmp_path: Path) -> None:
    (package / PACKAGE).rename(tmp_path / "elsewhere")
    (package / PACKAGE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineLoadError, match="is a link"):
        find(KEY)


def test_damaged_and_missing_parts_are_refused(package: Path) -> None:
    (package / RECORD).write_bytes(b"{")
    with pytest.raises(EngineLoadError, match="damaged"):
        find(KEY)
    (package / PACKAGE).unlink()
    with pytest.raises(EngineLoadError, match=f"lacks {PACKAGE}"):
        find(KEY)


def test_a_build_that_fails_leaves_nothing(package: Path) -> None:
    def build() -> None:
        with writing(KEY) as folder:
            (folder / PACKAGE).write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build()
    assert [path.name for path in packages_folder().iterdir()] == [package.name]


@pytest.mark.parametrize("name", ["model.pt2", "model.pt", "weights.pkl"])
def test_programs_are_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(EngineLoadError, match="never opened"):
        refuse_programs(tmp_path / name)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "my-g++")
    with pytest.raises(EngineLoadError, match=r"needs a C\+\+ compiler, and my-g\+\+ is not installed: apt-get"):
        require_compiler()
